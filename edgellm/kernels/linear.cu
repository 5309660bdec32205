// Linear layers for one to sixteen rows: y = x · wᵀ, bound by how fast the weights arrive.
//
// A block takes every gridDim.x-th row block. Its warps part the columns among them; each streams its own panels
// through a ring in shared memory (cp.async), so weights arrive without anybody waiting for a neighbour. Of x a warp
// needs its own columns only: few enough are HELD in registers as the tensor cores want them, for all row blocks; others
// lie in shared memory. A norm in front is half done when x arrives (norm.cuh), and a factor in the epilogue is the rest.
//
// With SLABS > 1 the columns are parted among blocks, too, so that each has a part of x only; the slabs' sums are
// added in order, by the blocks of a cluster or by whichever block ends last.

#include "linear_epilogue.cuh"
#include "norm.cuh"
#include "packed.cuh"

enum Join { WHOLE = 0, LAST_BLOCK = 1, CLUSTER = 2 };

// What a linear's shared memory holds, in this order. `linear.py` computes the same.
template <int BITS, int GROUP, int ZERO, int K, int SLABS, int ROWS, int WARPS, int STAGES, int ABREAST, int SETS, bool HELD> struct Layout {
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
  static constexpr int SUMS = X + (HELD ? 0 : ROWS * X_STRIDE * 2);
  static constexpr bool SUMS_SHARED = BITS < 16 && (!HELD || ROWS > 8);
  static constexpr int FACTORS = SUMS + (!SUMS_SHARED ? 0 : (SLAB / GROUP * SUMS_STRIDE * 4 + 15) / 16 * 16);
  static constexpr int REDUCE = FACTORS + (ROWS * 4 + 15) / 16 * 16;
  static constexpr int PARTS = REDUCE + SETS * WARPS * ABREAST * ROWS * LINE * 4;
};

// weights: packed, row_blocks row blocks
// x: float16 [ROWS, K]; with NORM that is h of norm.cuh, made with `scales_in` float32 [ROWS]
// squares_in: with NORM float32 [ROWS, K / 16]; next_scales: float32 [ROWS] for the norm behind, or null
// bias: float32 [16 · row_blocks], or null
// out: STORE, SWIGLU float16 [ROWS, outputs]; LOGITS float32 [ROWS, outputs]; RESIDUAL adds to float32 [ROWS, outputs]
// gain … squares_out: what RESIDUAL leaves for the norm behind (norm.cuh), with `scales`; or null
// workspace: of LAST_BLOCK: 1024 counters, which are 0 before and after, then float32 [SLABS, row_blocks, ROWS, 16]
template <int BITS, int GROUP, int ZERO, int K, int SLABS, int JOIN, int ROWS, int EPILOGUE, bool NORM, int WARPS,
          int WARPS_K, int STAGES, int EARLY, int ABREAST, int SETS, bool HELD, int BLOCKS>
DEVICE void linear_body(const u8* __restrict__ weights, const u16* x, const float* squares_in, float epsilon,
                        const float* scales_in, float* next_scales, const float* __restrict__ bias, void* out,
                        const float* __restrict__ gain, const float* scales, u16* scaled, float* squares_out,
                        u8* workspace, int row_blocks, int outputs) {
  using P = Panel<BITS, GROUP, ZERO>;
  using L = Layout<BITS, GROUP, ZERO, K, SLABS, ROWS, WARPS, STAGES, ABREAST, SETS, HELD>;
  using W = Writer<EPILOGUE, NORM>;
  constexpr int THREADS = WARPS * 32, TILES = (ROWS + 7) / 8, SIDES = WARPS / WARPS_K, SIDE_BY_SIDE = SIDES * ABREAST;
  // Whether every warp has the same number of panels of a row block, and that number, or the most that one has.
  constexpr bool EVEN = L::PANELS % (SLABS * WARPS_K) == 0;
  constexpr int MOST = (L::SLAB_PANELS + WARPS_K - 1) / WARPS_K;
  DYNAMIC_SHARED(shared);
  float* const factors = (float*)(shared + L::FACTORS);
  float* const reduce = (float*)(shared + L::REDUCE);
  float* const parts = (float*)(shared + L::PARTS);
  float* const partials = (float*)(workspace + 4096);

  if constexpr (JOIN == CLUSTER) cluster_started();
  // Where the next kernel finds room beside this one, it starts at once.
  if constexpr (BLOCKS > 1) launch_dependents();
  u32 lane = threadIdx.x % 32;
  kept(lane);
  const int warp = threadIdx.x / 32, g = lane >> 2, t = lane & 3;
  const int part = warp % WARPS_K, side = warp / WARPS_K;
  const int slab = SLABS > 1 ? blockIdx.y : 0;
  const int slab_panels = EVEN ? L::SLAB_PANELS : min(L::SLAB_PANELS, L::PANELS - slab * L::SLAB_PANELS);
  const int begin = part * slab_panels / WARPS_K;
  const int count = EVEN ? MOST : (part + 1) * slab_panels / WARPS_K - begin;

  // A warp has row blocks first … first + ABREAST - 1, then `step` on, …; the block SIDE_BY_SIDE neighbours in a round.
  const int first = blockIdx.x * SIDE_BY_SIDE + side * ABREAST, step = gridDim.x * SIDE_BY_SIDE;

  // The ring: `source` runs over this warp's panels of each of its row blocks, STAGES - 1 ahead of use; with a panel
  // go those of the same columns of its ABREAST - 1 neighbours.
  constexpr int UNIT = ABREAST * P::BYTES, ROW_BLOCK_BYTES = L::PANELS * P::BYTES;
  u32 ring_at = L::RING + warp * STAGES * UNIT;
  kept(ring_at);
  u8* const ring = shared + ring_at;
  const u8* source = weights + ((u64)first * L::PANELS + slab * L::SLAB_PANELS + begin) * P::BYTES + lane * 16;
  u32 jump = (u32(step) * L::PANELS - count) * P::BYTES;
  const u32 target = shared_address(ring) + lane * 16;
  int to_jump = count, ahead = EVEN || count > 0 ? row_blocks - first : 0;
  kept(jump);
  auto issue = [&](u32 unit) {
    if (ahead > 0) {
#pragma unroll
      for (int r = 0; r < ABREAST; r++)
        if (r == 0 || r < ahead) {
#pragma unroll
          for (int at = 0; at < P::BYTES; at += 512)
            if (at + 512 <= P::BYTES || lane * 16 < P::BYTES - at)
              stream_async(target + unit + r * P::BYTES + at, source + r * ROW_BLOCK_BYTES + at);
        }
      source += P::BYTES;
      if (--to_jump == 0) to_jump = count, source += jump, ahead -= step;
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < EARLY; i++) issue(i * UNIT);
  wait_for_previous();

  // x and what else the kernels before have written: first, for it would wait behind weights.
  RowNorms<K, ROWS, WARPS> norms;
  if constexpr (NORM) norms.load(squares_in, scales_in);
  const u16* const x_slab = x + slab * L::SLAB + begin * P::COLUMNS;
  u16* const xs = (u16*)(shared + L::X) + begin * P::COLUMNS;
  HeldX<BITS, GROUP, ROWS, L::SUMS_STRIDE> held[MOST];
  if constexpr (HELD) {
#pragma unroll
    for (int i = 0; i < MOST; i++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int p = 0; p < P::MMAS / 2; p++) {
          const u64 at = (u64)(tile * 8 + (g & (ROWS - 1))) * K + i * P::COLUMNS;
          if (EVEN || i < count) held[i].pairs[tile][p] = held[i].load(x_slab + at, t, p);
        }
  } else {
    // Warps of the same columns part the rows among them; as many lanes as a panel's row needs take one each.
    constexpr int LANES = P::COLUMNS / 8;
#pragma unroll 1
    for (int i = 0; i < count; i++)
#pragma unroll
      for (int row0 = 0; row0 < ROWS; row0 += SIDES * 32 / LANES) {
        const int row = row0 + side * (32 / LANES) + lane / LANES, column = i * P::COLUMNS + lane % LANES * 8;
        if (row < ROWS) copy_async(xs + row * L::X_STRIDE + column, x_slab + (u64)row * K + column);
      }
    copy_async_commit();
  }
#pragma unroll 1
  for (int i = EARLY; i < STAGES - 1; i++) issue(i * UNIT);
  // Not sooner: the next kernel's weights would be ahead of this one's x.
  if constexpr (BLOCKS == 1) launch_dependents();
  if constexpr (NORM) {
    const bool leaves = next_scales && blockIdx.x == 0 && slab == 0;
    norms.finish(epsilon, factors, leaves ? next_scales : nullptr);
  }

  // Σx over groups: where x lies, and its sums go, of this warp's first panel. `together` are warps of the same columns.
  using X = SharedX<BITS, GROUP, L::SUMS_STRIDE>;
  u32 x_begin = L::X + ((g & (ROWS - 1)) * L::X_STRIDE + begin * P::COLUMNS + X::column(t)) * 2;
  u32 sums_begin =
      L::SUMS + (begin * P::GROUPS * L::SUMS_STRIDE + (2 * t & (L::SUMS_STRIDE < 8 ? L::SUMS_STRIDE - 1 : 7))) * 4;
  kept(x_begin), kept(sums_begin);
  auto together = [&] {
    if constexpr (SIDES > 1) {
      named_barrier<SIDES * 32>(1 + part);
    } else {
      __syncwarp();
    }
  };
  auto shared_sums = [&](int i) { return (float*)(shared + sums_begin) + i * P::GROUPS * L::SUMS_STRIDE; };
  auto shared_x = [&](int i) {
    return X{(const u16*)(shared + x_begin) + i * P::COLUMNS, 8 * L::X_STRIDE, shared_sums(i)};
  };
  // Of all sums together about eight chains, since little else is under way yet.
  constexpr int CHAINS = TILES * MOST < 2 ? 4 : TILES * MOST < 8 ? 8 / (TILES * MOST) : 1;
  auto share_sums = [&](const auto& its_x, int i) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
      for (int group = 0; group < P::GROUPS; group++) {
        const float2 sum = sum_group<BITS, GROUP, CHAINS>(its_x, tile, group);
        if (g == 0 && 2 * t < L::SUMS_STRIDE) *(float2*)(shared_sums(i) + group * L::SUMS_STRIDE + tile * 8) = sum;
      }
  };
  if constexpr (HELD) {
    // Warps of the same columns find the same sums, each for itself; the first leaves them where they are shared.
#pragma unroll
    for (int i = 0; i < MOST; i++) {
      if constexpr (BITS == 16) break;
      if (!EVEN && i >= count) break;
      if constexpr (L::SUMS_SHARED) {
        held[i].shared = shared_sums(i);
        if (side == 0) share_sums(held[i], i);
      } else {
#pragma unroll
        for (int group = 0; group < P::GROUPS; group++) held[i].held[group] = sum_group<BITS, GROUP, CHAINS>(held[i], 0, group);
      }
    }
    if constexpr (L::SUMS_SHARED) together();
  } else {
    copy_async_wait<STAGES - 1 - EARLY>();
    together();
    if constexpr (BITS < 16) {
#pragma unroll 1
      for (int i = side; i < count; i += SIDES) share_sums(shared_x(i), i);
      together();
    }
  }

  const W writer{factors, bias, out, gain, scales, scaled, squares_out, row_blocks, outputs};
  const int rounds = (row_blocks - int(blockIdx.x) * SIDE_BY_SIDE + step - 1) / step;
  const InCluster<SLABS, W::LINES> in_cluster(parts, rounds * SIDE_BY_SIDE * ROWS * W::LINES);
  if constexpr (JOIN == CLUSTER) cluster_wait();  // all its blocks have started: their shared memory is there
  u32 used = 0, freed = (STAGES - 1) * UNIT;
  int round = 0;
#pragma unroll 1
  for (int row_block0 = blockIdx.x * SIDE_BY_SIDE; row_block0 < row_blocks; row_block0 += step, round++) {
    const Element<ROWS, SIDE_BY_SIDE, W::LINES> own(threadIdx.x);
    typename W::Before before = {0.f, 0.f};
    if (JOIN == WHOLE && own.round == 0) before = writer.before(row_block0 + own.sub, own.n, own.line);
    float acc[ABREAST][TILES][4] = {};
    auto multiply = [&](const auto& its_x) {
      copy_async_wait<STAGES - 2>();
      __syncwarp();  // all lanes' copies have arrived, and nobody still reads the unit that is filled next
      issue(freed);
      multiply_panels<BITS, GROUP, ZERO, ROWS, ABREAST>(ring + used, P::BYTES, lane, its_x, acc);
      freed = used;
      used += UNIT;
      if (used == STAGES * UNIT) used = 0;
    };
    if (row_block0 + side * ABREAST < row_blocks) {
      if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < MOST; i++)
          if (EVEN || i < count) multiply(held[i]);
      } else {
#pragma unroll 1
        for (int i = 0; i < count; i++) multiply(shared_x(i));
      }
    }
    // With two sets of buffers, who is ahead writes into the other one.
    constexpr int BUFFER = WARPS * ABREAST * ROWS * L::LINE;
    float* const buffer = reduce + round % SETS * BUFFER;
#pragma unroll
    for (int r = 0; r < ABREAST; r++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int n = tile * 8 + 2 * t + i % 2;
          if (n < ROWS) buffer[((warp * ABREAST + r) * ROWS + n) * L::LINE + g + i / 2 * 8] = acc[r][tile][i];
        }
    __syncthreads();
    const Reduced<ROWS, WARPS_K, ABREAST, L::LINE> reduced{buffer};
    if constexpr (JOIN == WHOLE) {
      constexpr int ELEMENTS = SIDE_BY_SIDE * ROWS * W::LINES;
#pragma unroll 1
      for (int e = threadIdx.x; (e & ~31) < ELEMENTS; e += THREADS) {
        const Element<ROWS, SIDE_BY_SIDE, W::LINES> at(e);
        const int row_block = row_block0 + at.sub;
        const bool there = e < ELEMENTS && row_block < row_blocks;
        if (e >= THREADS) before = writer.before(row_block, at.n, at.line);
        const float v = there ? reduced(at.sub, at.n, at.line) : 0.f;
        const float up = EPILOGUE == SWIGLU && there ? reduced(at.sub, at.n, at.line + 8) : 0.f;
        writer.put(row_block, at.n, at.line, there, v, up, before);
      }
    } else {
      constexpr int ELEMENTS = SIDE_BY_SIDE * ROWS * ROW_BLOCK;
#pragma unroll 1
      for (int e = threadIdx.x; e < ELEMENTS; e += THREADS) {
        const Element<ROWS, SIDE_BY_SIDE, ROW_BLOCK> at(e);
        const int row_block = row_block0 + at.sub;
        if (row_block >= row_blocks) continue;
        const float v = reduced(at.sub, at.n, at.line);
        if constexpr (JOIN == CLUSTER) {
          const int element = ((round * SIDE_BY_SIDE + at.sub) * ROWS + at.n) * W::LINES + at.line % W::LINES;
          in_cluster.put(slab, element, at.line / W::LINES, v);
        } else {
          partials[(((u64)slab * row_blocks + row_block) * ROWS + at.n) * ROW_BLOCK + at.line] = v;
        }
      }
    }
    if (SETS == 1 && row_block0 + step < row_blocks) __syncthreads();
  }

  const int row_block0 = blockIdx.x * SIDE_BY_SIDE;
  if constexpr (JOIN == CLUSTER) {
    cluster_arrive();
    writer.template put_all<ROWS, SIDE_BY_SIDE>(in_cluster, row_block0, step, round, in_cluster.mine(slab, threadIdx.x),
                                                SLABS * THREADS, [] { cluster_wait(); });
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
    const InWorkspace<ROWS, SLABS> source{partials + (u64)row_block0 * ROWS * ROW_BLOCK, step,
                                          (u64)row_blocks * ROWS * ROW_BLOCK};
    writer.template put_all<ROWS, SIDE_BY_SIDE>(source, row_block0, step, round, threadIdx.x, THREADS, [] {});
  }
}

template <int BITS, int GROUP, int ZERO, int K, int SLABS, int JOIN, int ROWS, int EPILOGUE, bool NORM, int WARPS,
          int WARPS_K, int STAGES, int EARLY, int ABREAST, int SETS, bool HELD, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    linear(const u8* weights, const u16* x, const float* squares_in, float epsilon, const float* scales_in,
           float* next_scales, const float* bias, void* out, const float* gain, const float* scales, u16* scaled,
           float* squares_out, u8* workspace, int row_blocks, int outputs) {
  linear_body<BITS, GROUP, ZERO, K, SLABS, JOIN, ROWS, EPILOGUE, NORM, WARPS, WARPS_K, STAGES, EARLY, ABREAST, SETS, HELD, BLOCKS>(
      weights, x, squares_in, epsilon, scales_in, next_scales, bias, out, gain, scales, scaled, squares_out, workspace,
      row_blocks, outputs);
}

#if __CUDA_ARCH__ >= 900
template <int BITS, int GROUP, int ZERO, int K, int SLABS, int ROWS, int EPILOGUE, bool NORM, int WARPS, int WARPS_K,
          int STAGES, int EARLY, int ABREAST, int SETS, bool HELD, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS) __cluster_dims__(1, SLABS, 1)
    cluster_linear(const u8* weights, const u16* x, const float* squares_in, float epsilon, const float* scales_in,
                   float* next_scales, const float* bias, void* out, const float* gain, const float* scales,
                   u16* scaled, float* squares_out, u8* workspace, int row_blocks, int outputs) {
  linear_body<BITS, GROUP, ZERO, K, SLABS, CLUSTER, ROWS, EPILOGUE, NORM, WARPS, WARPS_K, STAGES, EARLY, ABREAST, SETS, HELD, BLOCKS>(
      weights, x, squares_in, epsilon, scales_in, next_scales, bias, out, gain, scales, scaled, squares_out, workspace,
      row_blocks, outputs);
}
#endif
