// Linear layers for one to sixteen rows: y = x · wᵀ, bound by how fast the weights arrive.
//
// A block takes every gridDim.x-th row block. Its warps part the columns among them; each streams its own panels
// through a ring in shared memory (cp.async), so weights arrive without anybody waiting for a neighbour. x lies
// in shared memory as float16 beside the sums of its groups. Where x is the float32 residual, the block brings it
// through the norm on the way there: whoever wrote the residual left sums of its squares.
//
// With SLABS > 1 the columns are parted among blocks, too, so that each holds a part of x only; the slabs' sums are
// added in order, by the blocks of a cluster or by whichever block ends last.

#include "packed.cuh"

enum Epilogue { STORE = 0, RESIDUAL = 1, SWIGLU = 2, LOGITS = 3 };
enum Join { WHOLE = 0, LAST_BLOCK = 1, CLUSTER = 2, SHARED_X = 3 };

// What a linear's shared memory holds, in this order. `linear.py` computes the same.
template <int BITS, int GROUP, int ZERO, int K, int SLABS, int ROWS, int WARPS, int STAGES, int ABREAST, int BATCH, int SETS, bool NORM> struct Layout {
  using P = Panel<BITS, GROUP, ZERO>;
  static constexpr int PANELS = K / P::COLUMNS;
  static constexpr int SLAB_PANELS = (PANELS + SLABS - 1) / SLABS;
  static constexpr int SLAB = SLAB_PANELS * P::COLUMNS;
  // 64 bytes beyond a multiple of 128: eight lanes' loads from two rows fall into different banks.
  static constexpr int X_STRIDE = SLAB + 32;
  static constexpr int SUMS_STRIDE = ROWS < 2 ? 2 : ROWS;
  // 20 floats for 16 rows: lanes (g, t) write rows g of columns 2t without a conflict.
  static constexpr int LINE = 20;

  static constexpr int RING = 0;
  static constexpr int X = RING + WARPS * STAGES * ABREAST * P::BYTES;
  static constexpr int SUMS = X + ROWS * X_STRIDE * 2;
  static constexpr int REDUCE = SUMS + (BITS < 16 ? (SLAB / GROUP * SUMS_STRIDE * 4 + 15) / 16 * 16 : 0);
  static constexpr int GAIN = REDUCE + SETS * BATCH * WARPS * ABREAST * ROWS * LINE * 4;
  static constexpr int PARTS = GAIN + (NORM ? SLAB * 4 : 0);
};

// Eight neighbouring values of x as they lie in memory.
template <bool NORM> struct Eight;

template <> struct Eight<false> {
  uint4 halves;
  DEVICE void load(const void* x, u64 at) { halves = load_l2((const uint4*)((const u16*)x + at)); }
  DEVICE uint4 packed(float, const float*) const { return halves; }
};

template <> struct Eight<true> {
  float4 low, high;
  DEVICE void load(const void* x, u64 at) {
    low = load_l2((const float4*)((const float*)x + at));
    high = load_l2((const float4*)((const float*)x + at) + 1);
  }
  DEVICE uint4 packed(float factor, const float* gain) const {
    const float4 p = *(const float4*)gain, q = *(const float4*)(gain + 4);
    return make_uint4(pack_half2_saturated(low.x * factor * p.x, low.y * factor * p.y),
                      pack_half2_saturated(low.z * factor * p.z, low.w * factor * p.w),
                      pack_half2_saturated(high.x * factor * q.x, high.y * factor * q.y),
                      pack_half2_saturated(high.z * factor * q.z, high.w * factor * q.w));
  }
};

// x of this slab to shared memory as float16, by way of the norm with this slab's `gain`, and the sums of its groups
// as the tensor cores will see it. Loads are in flight together: several strips of columns, and the squares. Of SHARED
// blocks in a cluster each brings its share of the rows to all.
template <int K, int SLAB, int ROWS, int SHARED, int WARPS, int GROUP, bool SUMMED, bool NORM, int X_STRIDE, int SUMS_STRIDE>
DEVICE void load_x(const void* x, const float* gain, const float* squares, float epsilon, int first, int columns,
                   u16* xs, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int STRIP = 256;  // a lane has 8 neighbouring columns of it
  constexpr int HERE = ROWS / SHARED;                // rows of this block
  constexpr int SIDE = HERE < WARPS ? HERE : WARPS;  // of them at a time
  constexpr int SHARE = WARPS / SIDE;                // warps to a row
  constexpr int MINE = (SLAB + STRIP * SHARE - 1) / (STRIP * SHARE);
  constexpr int AT_ONCE = MINE < (NORM ? 4 : 6) ? MINE : (NORM ? 4 : 6);
  if (warp >= SIDE * SHARE) return;
#pragma unroll 1
  for (int part = warp % SIDE; part < HERE; part += SIDE) {
    const int row = SHARED > 1 ? part * SHARED + blockIdx.x % SHARED : part;
    constexpr int FOURS = K / ROW_BLOCK / 4, LOADS = NORM ? (FOURS + 31) / 32 : 1;
    float4 square[LOADS];
    float factor = 1.f;
    if constexpr (NORM) {
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        square[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (i * 32 + lane < FOURS)
          square[i] = load_l2((const float4*)(squares + (u64)row * (K / ROW_BLOCK)) + i * 32 + lane);
      }
    }
#pragma unroll 1
    for (int begin = 0; begin < MINE; begin += AT_ONCE) {
      Eight<NORM> eight[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int column = ((begin + i) * SHARE + warp / SIDE) * STRIP + lane * 8;
        if (column < columns) eight[i].load(x, (u64)row * K + first + column);
      }
      if constexpr (NORM) {
        if (begin == 0) {
          float sum = 0.f;
#pragma unroll
          for (int i = 0; i < LOADS; i++) sum += (square[i].x + square[i].y) + (square[i].z + square[i].w);
          factor = rsqrtf(warp_sum(sum) * (1.f / K) + epsilon);
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int column = ((begin + i) * SHARE + warp / SIDE) * STRIP + lane * 8;
        const bool inside = column < columns;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (inside) {
          packed = eight[i].packed(factor, gain + column);
          if constexpr (SHARED > 1) {
#pragma unroll
            for (int rank = 0; rank < SHARED; rank++)
              store_cluster(cluster_address(shared_address(xs + row * X_STRIDE + column), rank), packed);
          } else {
            *(uint4*)(xs + row * X_STRIDE + column) = packed;
          }
        }
        if constexpr (SUMMED) {
          const float2 a = half2_to_float2(packed.x), b = half2_to_float2(packed.y);
          const float2 c = half2_to_float2(packed.z), d = half2_to_float2(packed.w);
          float sum = ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
#pragma unroll
          for (int o = 1; o < GROUP / 8; o *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, o);
          if (inside && lane % (GROUP / 8) == 0) {
            if constexpr (SHARED > 1) {
#pragma unroll
              for (int rank = 0; rank < SHARED; rank++)
                store_cluster(cluster_address(shared_address(sums + column / GROUP * SUMS_STRIDE + row), rank), sum);
            } else {
              sums[column / GROUP * SUMS_STRIDE + row] = sum;
            }
            if constexpr (ROWS == 1) sums[column / GROUP * SUMS_STRIDE + 1] = sum;
          }
        }
      }
    }
  }
}

// Where a slab's sums of a round are found, by the row block's place among the block's, row and line of it.

template <int ROWS, int WARPS_K, int ABREAST, int LINE> struct Reduced {  // of the warps of this block
  const float* buffer;
  DEVICE float operator()(int sub, int n, int line) const {
    const float* const from = buffer + ((sub / ABREAST * WARPS_K * ABREAST + sub % ABREAST) * ROWS + n) * LINE + line;
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS_K; i++) v += from[i * ABREAST * ROWS * LINE];
    return v;
  }
};

template <int ROWS, int SLABS> struct InCluster {  // of the cluster's blocks
  const float* parts;
  DEVICE float operator()(int sub, int n, int line) const {
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < SLABS; i++) v += load_cluster(cluster_address(shared_address(parts + (sub * ROWS + n) * ROW_BLOCK + line), i));
    return v;
  }
};

template <int ROWS, int SLABS> struct InWorkspace {  // of all slabs; `partials` at the round's first row block
  const float* partials;
  u64 slab_stride;
  DEVICE float operator()(int sub, int n, int line) const {
    float v = 0.f;
#pragma unroll
    for (int i = 0; i < SLABS; i++) v += load_l2(partials + i * slab_stride + (sub * ROWS + n) * ROW_BLOCK + line);
    return v;
  }
};

// What becomes of y.
template <int EPILOGUE> struct Writer {
  const float* bias;
  void* out;
  float* squares_out;
  int row_blocks, outputs;
  // Lines of a row block that have a result: with SWIGLU a pair of rows, `line` and `line + 8`, becomes one.
  static constexpr int LINES = EPILOGUE == SWIGLU ? 8 : 16;

  DEVICE bool has(int row_block, int line) const {
    return row_block < row_blocks && row_block * LINES + line < outputs;
  }

  // The residual that will be added to; loaded early, it costs no time at the end.
  DEVICE float old(int row_block, int n, int line) const {
    if (EPILOGUE != RESIDUAL || !has(row_block, line)) return 0.f;
    return load_l2((const float*)out + (u64)n * outputs + row_block * LINES + line);
  }

  // One line; whole warps call it, with sixteen lanes for the lines of a row, and `there` says who has one.
  DEVICE void put(int row_block, int n, int line, bool there, float v, float up, float old) const {
    if (bias && there) v += bias[row_block * ROW_BLOCK + line];
    const u64 at = (u64)n * outputs + row_block * LINES + line;
    const bool stored = there && has(row_block, line);
    if constexpr (EPILOGUE == SWIGLU) {
      if (bias && there) up += bias[row_block * ROW_BLOCK + line + 8];
      if (stored) ((u16*)out)[at] = float_to_half(v / (1.f + __expf(-v)) * up);
    } else if constexpr (EPILOGUE == RESIDUAL) {
      v += old;
      if (stored) ((float*)out)[at] = v;
      if (squares_out) {
        float square = stored ? v * v : 0.f;
#pragma unroll
        for (int o = 8; o; o >>= 1) square += __shfl_xor_sync(FULL_WARP, square, o);
        if (stored && line == 0) squares_out[(u64)n * row_blocks + row_block] = square;
      }
    } else if constexpr (EPILOGUE == LOGITS) {
      if (stored) ((float*)out)[at] = v;
    } else {
      if (stored) ((u16*)out)[at] = float_to_half(v);
    }
  }
};

// Element e of some rounds of row blocks, SIDE_BY_SIDE · ROWS · LINES each: whose it is.
template <int ROWS, int SIDE_BY_SIDE, int LINES> struct Element {
  int round, sub, n, line;
  DEVICE explicit Element(int e)
      : round(e / (SIDE_BY_SIDE * ROWS * LINES)), sub(e / (ROWS * LINES) % SIDE_BY_SIDE), n(e / LINES % ROWS),
        line(e % LINES) {}
};

// weights: packed, row_blocks row blocks
// x: float16 [ROWS, K]; with NORM the float32 residual, `gain` float32 [K], `squares` float32 [ROWS, K / 16]:
//    sums of squares of 16 neighbours
// bias: float32 [16 · row_blocks], or null
// out: STORE, SWIGLU float16 [ROWS, outputs]; LOGITS float32 [ROWS, outputs]; RESIDUAL adds to float32 [ROWS, outputs]
// squares_out: of the new residual, float32 [ROWS, outputs / 16], or null
// workspace: of LAST_BLOCK: 1024 counters, which are 0 before and after, then float32 [SLABS, row_blocks, ROWS, 16]
template <int BITS, int GROUP, int ZERO, int K, int PARTS, int JOIN, int ROWS, int EPILOGUE, bool NORM, int WARPS,
          int WARPS_K, int STAGES, int EARLY, int ABREAST, int BATCH, int SETS>
DEVICE void linear_body(const u8* __restrict__ weights, const void* x, const float* __restrict__ gain,
                        const float* squares, float epsilon, const float* __restrict__ bias, void* out,
                        float* squares_out, u8* workspace, int row_blocks, int outputs) {
  // Blocks of a cluster either part the columns or share the work of loading x.
  constexpr int SLABS = JOIN == SHARED_X ? 1 : PARTS, SHARED = JOIN == SHARED_X ? PARTS : 1;
  using P = Panel<BITS, GROUP, ZERO>;
  using L = Layout<BITS, GROUP, ZERO, K, SLABS, ROWS, WARPS, STAGES, ABREAST, BATCH, SETS, NORM>;
  using W = Writer<EPILOGUE>;
  constexpr int THREADS = WARPS * 32, TILES = (ROWS + 7) / 8, SIDE_BY_SIDE = WARPS / WARPS_K * ABREAST;
  // Whether every warp has the same number of panels of a row block.
  constexpr bool EVEN = L::PANELS % (SLABS * WARPS_K) == 0;
  DYNAMIC_SHARED(shared);
  u16* const xs = (u16*)(shared + L::X);
  float* const sums = (float*)(shared + L::SUMS);
  float* const reduce = (float*)(shared + L::REDUCE);
  float* const parts = (float*)(shared + L::PARTS);
  float* const partials = (float*)(workspace + 4096);

  u32 lane = threadIdx.x % 32;
  kept(lane);
  const int warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
  const int slab = SLABS > 1 ? blockIdx.y : 0;
  const int slab_panels = EVEN ? L::SLAB_PANELS : min(L::SLAB_PANELS, L::PANELS - slab * L::SLAB_PANELS);

  // Row blocks first … first + ABREAST - 1, then `step` on, …; in a round the block takes SIDE_BY_SIDE neighbours.
  const int first = blockIdx.x * SIDE_BY_SIDE + warp / WARPS_K * ABREAST, step = gridDim.x * SIDE_BY_SIDE;
  const int rounds = (row_blocks - int(blockIdx.x) * SIDE_BY_SIDE + step - 1) / step;
  const int mine = first < row_blocks ? (row_blocks - first + step - 1) / step : 0;
  const int begin = warp % WARPS_K * slab_panels / WARPS_K;
  const int count = EVEN ? L::SLAB_PANELS / WARPS_K : (warp % WARPS_K + 1) * slab_panels / WARPS_K - begin;

  // The gain first: behind the weights it would arrive late.
  float* const gains = (float*)(shared + L::GAIN);
  if constexpr (NORM) {
    for (int i = threadIdx.x; i < slab_panels * P::COLUMNS / 4; i += THREADS)
      copy_async(gains + i * 4, gain + slab * L::SLAB + i * 4);
    copy_async_commit();
  }

  // The ring: `source` runs over this warp's panels of each of its row blocks, STAGES - 1 ahead of use; with a panel
  // go those of the same columns of its ABREAST - 1 neighbours.
  constexpr int UNIT = ABREAST * P::BYTES, ROW_BLOCK_BYTES = L::PANELS * P::BYTES;
  u32 ring_at = L::RING + warp * STAGES * UNIT;
  kept(ring_at);
  u8* const ring = shared + ring_at;
  const u8* source = weights + ((u64)first * L::PANELS + slab * L::SLAB_PANELS + begin) * P::BYTES + lane * 16;
  u32 jump = (u32(step) * L::PANELS - count) * P::BYTES;
  u32 target = shared_address(ring) + lane * 16;
  u32 target_end = target + STAGES * UNIT;
  int to_issue = mine * count, to_jump = count, neighbours = row_blocks - first;
  kept(jump), kept(target), kept(target_end);
  auto issue = [&] {
    if (to_issue > 0) {
#pragma unroll
      for (int r = 0; r < ABREAST; r++)
        if (r == 0 || r < neighbours) {
#pragma unroll
          for (int at = 0; at < P::BYTES; at += 512)
            if (at + 512 <= P::BYTES || lane * 16 < P::BYTES - at)
              stream_async(target + r * P::BYTES + at, source + r * ROW_BLOCK_BYTES + at);
        }
      source += P::BYTES;
      target += UNIT;
      if (--to_jump == 0) to_jump = count, source += jump, neighbours -= step;
      if (target == target_end) target -= STAGES * UNIT;
      to_issue--;
    }
    copy_async_commit();
  };
  if constexpr (SHARED > 1) cluster_started();
  // The rest follows behind x, which would wait behind it.
#pragma unroll 1
  for (int i = 0; i < EARLY; i++) issue();
  if constexpr (NORM) {
    copy_async_wait<EARLY>();
    __syncthreads();
  }
  wait_for_previous();

  const W writer{bias, out, squares_out, row_blocks, outputs};
  const Element<ROWS, SIDE_BY_SIDE, W::LINES> early(threadIdx.x);
  float old = 0.f;
  if constexpr (JOIN == WHOLE || JOIN == SHARED_X)
    if (early.round < BATCH) old = writer.old(blockIdx.x * SIDE_BY_SIDE + early.round * step + early.sub, early.n, early.line);

  if constexpr (SHARED > 1) cluster_wait();
  load_x<K, L::SLAB, ROWS, SHARED, WARPS, GROUP, (BITS < 16), NORM, L::X_STRIDE, L::SUMS_STRIDE>(
      x, gains, squares, epsilon, slab * L::SLAB, slab_panels * P::COLUMNS, xs, sums);
#pragma unroll 1
  for (int i = EARLY; i < STAGES - 1; i++) issue();
  // Not sooner: the next kernel's weights would be ahead of this one's x.
  launch_dependents();
  if constexpr (SHARED > 1) {
    cluster_barrier();
  } else {
    __syncthreads();
  }

  // Offsets into shared memory of what a lane reads of x and its sums, for this warp's first panel.
  u32 x_begin = L::X + ((g & (ROWS - 1)) * L::X_STRIDE + begin * P::COLUMNS) * 2;
  u32 sums_begin =
      L::SUMS + (begin * P::GROUPS * L::SUMS_STRIDE + (2 * t & (L::SUMS_STRIDE < 8 ? L::SUMS_STRIDE - 1 : 7))) * 4;
  kept(x_begin), kept(sums_begin);
  u32 used = 0;
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    float acc[ABREAST][TILES][4] = {};
    if (first + round * step < row_blocks) {
      u32 x_at = x_begin, sums_at = sums_begin;
#pragma unroll 1
      for (int i = 0; i < count; i++) {
        copy_async_wait<STAGES - 2>();
        __syncwarp();  // all lanes' copies have arrived, and nobody still reads the unit that is filled next
        issue();
        multiply_panels<BITS, GROUP, ZERO, ROWS, L::SUMS_STRIDE, ABREAST>(
            ring + used, P::BYTES, lane, (const u16*)(shared + x_at), 8 * L::X_STRIDE, (const float*)(shared + sums_at),
            acc);
        x_at += P::COLUMNS * 2;
        sums_at += P::GROUPS * L::SUMS_STRIDE * 4;
        used += UNIT;
        if (used == STAGES * UNIT) used = 0;
      }
    }
    // The warps' sums meet every BATCH rounds. With two sets of buffers, who is ahead writes into the other one.
    constexpr int BUFFER = WARPS * ABREAST * ROWS * L::LINE;
    float* const buffers = reduce + round / BATCH % SETS * BATCH * BUFFER;
#pragma unroll
    for (int r = 0; r < ABREAST; r++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int n = tile * 8 + 2 * t + i % 2;
          if (n < ROWS)
            buffers[round % BATCH * BUFFER + ((warp * ABREAST + r) * ROWS + n) * L::LINE + g + i / 2 * 8] =
                acc[r][tile][i];
        }
    if (round % BATCH < BATCH - 1 && round < rounds - 1) continue;
    __syncthreads();
    const int round0 = round / BATCH * BATCH, here = round - round0 + 1;
    if constexpr (JOIN == WHOLE || JOIN == SHARED_X) {
      const int elements = here * SIDE_BY_SIDE * ROWS * W::LINES;
#pragma unroll 1
      for (int e = threadIdx.x; (e & ~31) < elements; e += THREADS) {
        const Element<ROWS, SIDE_BY_SIDE, W::LINES> at(e);
        const int row_block = blockIdx.x * SIDE_BY_SIDE + (round0 + at.round) * step + at.sub;
        const bool there = e < elements && row_block < row_blocks;
        const Reduced<ROWS, WARPS_K, ABREAST, L::LINE> source{buffers + at.round * BUFFER};
        if (round0 > 0 || e >= THREADS) old = there ? writer.old(row_block, at.n, at.line) : 0.f;
        const float v = there ? source(at.sub, at.n, at.line) : 0.f;
        const float up = EPILOGUE == SWIGLU && there ? source(at.sub, at.n, at.line + 8) : 0.f;
        writer.put(row_block, at.n, at.line, there, v, up, old);
      }
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < here * SIDE_BY_SIDE * ROWS * ROW_BLOCK; e += THREADS) {
        const Element<ROWS, SIDE_BY_SIDE, ROW_BLOCK> at(e);
        const int row_block = blockIdx.x * SIDE_BY_SIDE + (round0 + at.round) * step + at.sub;
        if (row_block >= row_blocks) continue;
        const float v = Reduced<ROWS, WARPS_K, ABREAST, L::LINE>{buffers + at.round * BUFFER}(at.sub, at.n, at.line);
        if constexpr (JOIN == CLUSTER) {
          parts[round0 * SIDE_BY_SIDE * ROWS * ROW_BLOCK + e] = v;
        } else {
          partials[(((u64)slab * row_blocks + row_block) * ROWS + at.n) * ROW_BLOCK + at.line] = v;
        }
      }
    }
    if (SETS == 1 && round < rounds - 1) __syncthreads();
  }

  if constexpr (JOIN == CLUSTER) {
    cluster_barrier();
    // Each block takes its share of the elements of all rounds.
    const int elements = rounds * SIDE_BY_SIDE * ROWS * W::LINES;
#pragma unroll 1
    for (int e = slab * THREADS + threadIdx.x; (e & ~31) < elements; e += SLABS * THREADS) {
      const Element<ROWS, SIDE_BY_SIDE, W::LINES> at(e);
      const int row_block = blockIdx.x * SIDE_BY_SIDE + at.round * step + at.sub;
      const bool there = e < elements && row_block < row_blocks;
      const InCluster<ROWS, SLABS> source{parts + at.round * SIDE_BY_SIDE * ROWS * ROW_BLOCK};
      old = there ? writer.old(row_block, at.n, at.line) : 0.f;
      const float v = there ? source(at.sub, at.n, at.line) : 0.f;
      const float up = EPILOGUE == SWIGLU && there ? source(at.sub, at.n, at.line + 8) : 0.f;
      writer.put(row_block, at.n, at.line, there, v, up, old);
    }
    cluster_barrier();  // nobody leaves while others read its shared memory
  }
  if constexpr (JOIN == LAST_BLOCK) {
    int* const last = (int*)reduce;  // whose sums everybody has read after the next barrier
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* const counter = (int*)workspace + blockIdx.x;
      *last = atomicAdd(counter, 1) == SLABS - 1;
      if (*last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    if (!*last) return;
    const int elements = rounds * SIDE_BY_SIDE * ROWS * W::LINES;
#pragma unroll 1
    for (int e = threadIdx.x; (e & ~31) < elements; e += THREADS) {
      const Element<ROWS, SIDE_BY_SIDE, W::LINES> at(e);
      const int row_block = blockIdx.x * SIDE_BY_SIDE + at.round * step + at.sub;
      const bool there = e < elements && row_block < row_blocks;
      const InWorkspace<ROWS, SLABS> source{partials + (u64)row_block * ROWS * ROW_BLOCK,
                                            (u64)row_blocks * ROWS * ROW_BLOCK};
      old = there ? writer.old(row_block, at.n, at.line) : 0.f;
      const float v = there ? source(0, at.n, at.line) : 0.f;
      const float up = EPILOGUE == SWIGLU && there ? source(0, at.n, at.line + 8) : 0.f;
      writer.put(row_block, at.n, at.line, there, v, up, old);
    }
  }
}

template <int BITS, int GROUP, int ZERO, int K, int SLABS, int JOIN, int ROWS, int EPILOGUE, bool NORM, int WARPS,
          int WARPS_K, int STAGES, int EARLY, int ABREAST, int BATCH, int SETS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    linear(const u8* weights, const void* x, const float* gain, const float* squares, float epsilon,
           const float* bias, void* out, float* squares_out, u8* workspace, int row_blocks, int outputs) {
  linear_body<BITS, GROUP, ZERO, K, SLABS, JOIN, ROWS, EPILOGUE, NORM, WARPS, WARPS_K, STAGES, EARLY, ABREAST, BATCH, SETS>(
      weights, x, gain, squares, epsilon, bias, out, squares_out, workspace, row_blocks, outputs);
}

#if __CUDA_ARCH__ >= 900
template <int BITS, int GROUP, int ZERO, int K, int SHARED, int ROWS, int EPILOGUE, bool NORM, int WARPS, int WARPS_K,
          int STAGES, int EARLY, int ABREAST, int BATCH, int SETS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) __cluster_dims__(SHARED, 1, 1)
    sharing_linear(const u8* weights, const void* x, const float* gain, const float* squares, float epsilon,
                   const float* bias, void* out, float* squares_out, u8* workspace, int row_blocks, int outputs) {
  linear_body<BITS, GROUP, ZERO, K, SHARED, SHARED_X, ROWS, EPILOGUE, NORM, WARPS, WARPS_K, STAGES, EARLY, ABREAST, BATCH, SETS>(
      weights, x, gain, squares, epsilon, bias, out, squares_out, workspace, row_blocks, outputs);
}

template <int BITS, int GROUP, int ZERO, int K, int SLABS, int ROWS, int EPILOGUE, bool NORM, int WARPS, int WARPS_K,
          int STAGES, int EARLY, int ABREAST, int BATCH, int SETS, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) __cluster_dims__(1, SLABS, 1)
    cluster_linear(const u8* weights, const void* x, const float* gain, const float* squares, float epsilon,
                   const float* bias, void* out, float* squares_out, u8* workspace, int row_blocks, int outputs) {
  linear_body<BITS, GROUP, ZERO, K, SLABS, CLUSTER, ROWS, EPILOGUE, NORM, WARPS, WARPS_K, STAGES, EARLY, ABREAST, BATCH, SETS>(
      weights, x, gain, squares, epsilon, bias, out, squares_out, workspace, row_blocks, outputs);
}
#endif
