// Mixtures of experts: what comes of a router's scores, and linears of which each row has its own.
//
//   route     each row's experts and their shares; the rows of an expert, in groups of at most MOST
//   experts   a linear over groups: an active expert's weights are read once for the rows of a group
//   combine   residual += Σ share · what the row's experts found
//
// Where experts have many rows each, gemm.cu's expert_gemm takes the place of `experts`, a tile for each group.
//
// A pair is a row with one of its experts. Groups, and pairs in them, lie in the order of experts, then of rows: the
// same from run to run. Grids do not depend on who was chosen, so that one graph serves all steps.

#include "groups.cuh"
#include "norm.cuh"
#include "packed.cuh"
#include "rows.cuh"

enum Epilogue { PAIRS = 0, SWIGLU = 2 };

// Whether the row exists: of a decode step's, or, from token `first` on, of a chunk.
DEVICE bool exists(const Row* rows, const Chunk* chunk, int first, int row) {
  return chunk ? first + row < chunk->count : rows[row].slot >= 0;
}

// ---- route

// Orders as the float does, NaN above all, and is never 0.
DEVICE u32 ordered(float v) {
  if (v != v) return 0xffffffffu;
  const u32 bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float unordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

constexpr u32 NOBODY = 0xffffu;

// A row's experts, of lane k the k-th best, and its share; all of a warp call it.
template <int EXPERTS, int TOP_K, bool NORMALIZE> DEVICE u32 choose_experts(const float* scores, float& share) {
  static_assert(TOP_K <= 32 && TOP_K <= EXPERTS, "a lane for each");
  constexpr int EACH = (EXPERTS + 31) / 32;
  const int lane = threadIdx.x % 32;
  u32 key[EACH];
  u32 best = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int expert = i * 32 + lane;
    key[i] = expert < EXPERTS ? ordered(load_l2(scores + expert)) : 0;
    best = max(best, key[i]);
  }
  const float highest = unordered(__reduce_max_sync(FULL_WARP, best));
  float sum = 0.f;
  if constexpr (!NORMALIZE) {
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += key[i] ? expf(unordered(key[i]) - highest) : 0.f;
  }
  u32 chosen = NOBODY;
  share = 0.f;
#pragma unroll 1
  for (int k = 0; k < TOP_K; k++) {
    best = key[0];
#pragma unroll
    for (int i = 1; i < EACH; i++) best = max(best, key[i]);
    best = __reduce_max_sync(FULL_WARP, best);
    u32 expert = NOBODY;
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--)
      if (key[i] == best) expert = i * 32 + lane;
    expert = __reduce_min_sync(FULL_WARP, expert);
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (u32(i * 32 + lane) == expert) key[i] = 0;
    if (lane == k) chosen = expert, share = expf(unordered(best) - highest);
  }
  if constexpr (NORMALIZE) sum = share;
  share /= warp_sum(sum);
  return chosen;
}

// For a chunk, whose rows are too many for one block: ids u16 [rows, TOP_K] and shares float32 [rows, TOP_K] of scores
// float32 [rows, EXPERTS]. A warp for each row.
template <int EXPERTS, int TOP_K, bool NORMALIZE>
__global__ void choose(const Chunk* __restrict__ chunk, int first, int rows, const float* scores, u16* ids,
                       float* shares) {
  const int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  launch_dependents();
  wait_for_previous();
  if (row >= rows) return;
  u32 expert = NOBODY;
  float share = 0.f;
  if (exists(nullptr, chunk, first, row))
    expert = choose_experts<EXPERTS, TOP_K, NORMALIZE>(scores + (u64)row * EXPERTS, share);
  if (lane < TOP_K) {
    ids[row * TOP_K + lane] = expert;
    shares[row * TOP_K + lane] = share;
  }
}

// One block. Of decode rows: scores float32 [rows, EXPERTS], and shares float32 [rows, TOP_K], in the order of falling
// scores, are written. CHOSEN: `choose` has been there, and ids are read.
// positions: int32 [rows, TOP_K], each pair's place among those in groups; pair_rows: int32, the row of a place.
// Rows that do not exist have no pairs. Dynamic shared memory: u16 counts [WARPS, EXPERTS], ids [rows · TOP_K].
template <int EXPERTS, int TOP_K, int MOST, bool NORMALIZE, bool CHOSEN, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 1)
    route(const Row* __restrict__ rows_at, int rows, const float* scores, const u16* chosen, Group* groups,
          int* pair_rows, int* positions, float* shares) {
  static_assert(WARPS * 32 >= EXPERTS, "a thread for each expert");
  DYNAMIC_SHARED(shared);
  __shared__ int begins[EXPERTS];
  __shared__ int2 totals[WARPS];
  const int pairs = rows * TOP_K;
  u16* const counts = (u16*)shared;
  u16* const ids = counts + WARPS * EXPERTS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  launch_dependents();
  for (int i = threadIdx.x; i < WARPS * EXPERTS; i += WARPS * 32) counts[i] = 0;
  wait_for_previous();

  if constexpr (CHOSEN) {
#pragma unroll 4
    for (int i = threadIdx.x; i < pairs; i += WARPS * 32) ids[i] = load_l2(chosen + i);
  } else {
    for (int row = warp; row < rows; row += WARPS) {
      u32 expert = NOBODY;
      float share = 0.f;
      if (exists(rows_at, nullptr, 0, row))
        expert = choose_experts<EXPERTS, TOP_K, NORMALIZE>(scores + (u64)row * EXPERTS, share);
      if (lane < TOP_K) ids[row * TOP_K + lane] = expert, shares[row * TOP_K + lane] = share;
    }
  }
  __syncthreads();

  // Each warp counts its part of the pairs, by expert: `counts` of earlier warps say where a warp's pairs begin.
  const int part = (pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
  const int from = warp * part, to = min(pairs, from + part);
  u16* const here = counts + warp * EXPERTS;
  for (int i = from; i < to; i += 32) {
    const u32 expert = i + lane < to ? ids[i + lane] : NOBODY;
    const u32 same = __match_any_sync(FULL_WARP, expert);
    if (expert != NOBODY && lane == __ffs(same) - 1) here[expert] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  int count = 0;
  if (threadIdx.x < EXPERTS) {
#pragma unroll 4
    for (int i = 0; i < WARPS; i++) {
      const int its = counts[i * EXPERTS + threadIdx.x];
      counts[i * EXPERTS + threadIdx.x] = count;
      count += its;
    }
  }
  // Pairs and groups before this thread's expert.
  const int2 own = make_int2(count, (count + MOST - 1) / MOST);
  int2 before = own;
#pragma unroll
  for (int o = 1; o < 32; o *= 2) {
    const int x = __shfl_up_sync(FULL_WARP, before.x, o), y = __shfl_up_sync(FULL_WARP, before.y, o);
    if (lane >= o) before.x += x, before.y += y;
  }
  if (lane == 31) totals[warp] = before;
  before.x -= own.x, before.y -= own.y;
  __syncthreads();
  for (int i = 0; i < warp; i++) before.x += totals[i].x, before.y += totals[i].y;
  if (threadIdx.x < EXPERTS) {
    begins[threadIdx.x] = before.x;
    for (int i = 0; i < own.y; i++)
      groups[1 + before.y + i] = {int(threadIdx.x), before.x + i * MOST, min(MOST, count - i * MOST), 0};
  }
  if (threadIdx.x == WARPS * 32 - 1) groups[0] = {before.y + own.y, 0, before.x + own.x, 0};
  __syncthreads();
  for (int i = from; i < to; i += 32) {
    const u32 expert = i + lane < to ? ids[i + lane] : NOBODY;
    const u32 same = __match_any_sync(FULL_WARP, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int position = expert == NOBODY ? 0 : begins[expert] + here[expert] + rank;
    __syncwarp();
    if (expert != NOBODY) {
      if (rank == 0) here[expert] += __popc(same);
      pair_rows[position] = (i + lane) / TOP_K;
      positions[i + lane] = position;
    }
    __syncwarp();
  }
}

// ---- experts

// What a block's shared memory holds, in this order. `moe_cuts.py` computes the same.
template <int BITS, int GROUP, int ZERO, int K, int MOST, int WARPS, int WARPS_K, int STAGES> struct Layout {
  using P = Panel<BITS, GROUP, ZERO>;
  static constexpr int PANELS = K / P::COLUMNS;
  // 64 bytes beyond a multiple of 128: eight lanes' loads from two rows fall into different banks.
  static constexpr int X_STRIDE = K + 32;
  static constexpr int SUMS_STRIDE = MOST < 2 ? 2 : MOST;

  static constexpr int RING = 0;
  static constexpr int X = RING + WARPS * STAGES * P::BYTES;
  static constexpr int SUMS = X + MOST * X_STRIDE * 2;
  static constexpr int REDUCE = (SUMS + (BITS < 16 ? K / GROUP * SUMS_STRIDE * 4 : 0) + 15) / 16 * 16;
  static constexpr int REDUCE_BYTES = WARPS_K > 1 ? WARPS * (MOST > 8 ? 2 : 1) * 512 : 0;  // twice
};

// The items of a team of warps, one after the other: row block `item % row_blocks` of group `item / row_blocks`. A
// block has items lo … hi − 1; those of one group go to its teams in turn.
struct Items {
  int row_blocks, hi, group, item, end;
  DEVICE Items(int row_blocks, int lo, int hi, int team) : row_blocks(row_blocks), hi(hi) {
    group = lo / row_blocks;
    item = lo + team;
    end = min(hi, (group + 1) * row_blocks);
    settle(team);
  }
  DEVICE bool there() const { return item < end; }
  // To the team's next item; whether that is of another group.
  DEVICE bool next(int team, int teams) {
    const int was = group;
    item += teams;
    settle(team);
    return group != was;
  }
  DEVICE void settle(int team) {
    while (item >= end && end < hi) {
      group++;
      item = end + team;
      end = min(hi, (group + 1) * row_blocks);
    }
  }
};

// A group's rows of x to shared memory, and the sums of their groups of columns as the tensor cores will see them.
template <class L, int K, int GROUP, int WARPS, bool SUMMED, bool GATHERED>
DEVICE void load_rows(const u16* x, const int* pair_rows, const Group& group, u16* xs, float* sums) {
  constexpr int STRIP = 256;  // a lane has 8 neighbouring columns of it
  constexpr int STRIPS = (K + STRIP - 1) / STRIP;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 2
  for (int i = warp; i < group.count * STRIPS; i += WARPS) {
    const int row = i / STRIPS, column = i % STRIPS * STRIP + lane * 8;
    const bool inside = column < K;
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (inside) {
      const int pair = group.begin + row;
      const int from = GATHERED ? load_l2(pair_rows + pair) : pair;
      packed = load_l2((const uint4*)(x + (u64)from * K + column));
      *(uint4*)(xs + row * L::X_STRIDE + column) = packed;
    }
    if constexpr (SUMMED) {
      const float2 a = half2_to_float2(packed.x), b = half2_to_float2(packed.y);
      const float2 c = half2_to_float2(packed.z), d = half2_to_float2(packed.w);
      float sum = ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
#pragma unroll
      for (int o = 1; o < GROUP / 8; o *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, o);
      if (inside && lane % (GROUP / 8) == 0) sums[column / GROUP * L::SUMS_STRIDE + row] = sum;
    }
  }
}

// Sums over a team's warps, found by the first of them.
template <int WARPS_K> struct TeamSum {
  float4* buffer;  // two: who is an item ahead writes into the other one
  int other;

  // Whether this warp has the sums now, in `acc`.
  template <int TILES> DEVICE bool operator()(float (&acc)[TILES][4]) {
    if constexpr (WARPS_K == 1) return true;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* const mine = buffer + warp * TILES * 32 + lane;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      mine[tile * 32] = make_float4(acc[tile][0], acc[tile][1], acc[tile][2], acc[tile][3]);
    named_barrier<WARPS_K * 32>(1 + warp / WARPS_K);
    const bool first = warp % WARPS_K == 0;
    if (first) {
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 1; i < WARPS_K; i++) {
          const float4 v = mine[(i * TILES + tile) * 32];
          acc[tile][0] += v.x, acc[tile][1] += v.y, acc[tile][2] += v.z, acc[tile][3] += v.w;
        }
    }
    buffer += other, other = -other;
    return first;
  }
};

// weights: packed experts, one behind the other
// x: float16; GATHERED [rows, K], of which a pair takes its row, otherwise [pairs, K]
// out: SWIGLU float16 [pairs, outputs]; PAIRS float32 [pairs, outputs]
template <int BITS, int GROUP, int ZERO, int K, int MOST, int EPILOGUE, bool GATHERED, int WARPS, int WARPS_K,
          int STAGES>
__global__ void __launch_bounds__(WARPS * 32, MOST > 8 || WARPS > 8 ? 1 : 2)
    experts(const Group* groups, const int* pair_rows, const u8* __restrict__ weights, const u16* x, void* out,
            int row_blocks, int outputs) {
  using P = Panel<BITS, GROUP, ZERO>;
  using L = Layout<BITS, GROUP, ZERO, K, MOST, WARPS, WARPS_K, STAGES>;
  constexpr int TEAMS = WARPS / WARPS_K;
  DYNAMIC_SHARED(shared);
  u16* const xs = (u16*)(shared + L::X);
  float* const sums = (float*)(shared + L::SUMS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  // WARPS_K warps are a team: an item is theirs together, each has its part of the panels.
  const int team = warp / WARPS_K, begin = warp % WARPS_K * L::PANELS / WARPS_K;
  const int count = (warp % WARPS_K + 1) * L::PANELS / WARPS_K - begin;

  launch_dependents();
  wait_for_previous();
  const u64 items = (u64)load_group(groups).expert * row_blocks;
  const int lo = items * blockIdx.x / gridDim.x, hi = items * (blockIdx.x + 1) / gridDim.x;
  if (lo == hi) return;

  // The ring: panels of this warp's items, one after the other, whatever group they are of.
  u8* const ring = shared + L::RING + warp * STAGES * P::BYTES;
  Items ahead(row_blocks, lo, hi, team);
  int expert = ahead.there() ? load_group(groups + 1 + ahead.group).expert : 0;
  int panels = 0;
  const u8* source = nullptr;
  u8* target = ring + lane * 16;
  auto aim = [&] {
    const u64 row_block = (u64)expert * row_blocks + ahead.item % row_blocks;
    source = weights + (row_block * L::PANELS + begin) * P::BYTES + lane * 16;
  };
  aim();
  auto issue = [&] {
    if (ahead.there() && count > 0) {
#pragma unroll
      for (int at = 0; at < P::BYTES; at += 512)
        if (at + 512 <= P::BYTES || lane * 16 < P::BYTES - at) copy_async(target + at, source + at);
      source += P::BYTES;
      if (++panels == count) {
        panels = 0;
        if (ahead.next(team, TEAMS) && ahead.there()) expert = load_group(groups + 1 + ahead.group).expert;
        aim();
      }
      target += P::BYTES;
      if (target >= ring + STAGES * P::BYTES) target -= STAGES * P::BYTES;
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) issue();

  using X = SharedX<BITS, GROUP, L::SUMS_STRIDE>;
  const u16* const x_lane = xs + (g & (MOST - 1)) * L::X_STRIDE + begin * P::COLUMNS + X::column(t);
  const float* const sums_lane =
      sums + begin * P::GROUPS * L::SUMS_STRIDE + (2 * t & (L::SUMS_STRIDE < 8 ? L::SUMS_STRIDE - 1 : 7));
  const u8* panel = ring;
  // Of one item, for one or two tiles of eight rows.
  auto finish = [&](int row_block, int begin, int count, int tile, const float (&acc)[4]) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = tile * 8 + 2 * t + i;
      if (n >= count) continue;
      if constexpr (EPILOGUE == SWIGLU) {
        const float gate = acc[i], up = acc[i + 2];
        const int column = row_block * 8 + g;
        if (column < outputs)
          ((u16*)out)[(u64)(begin + n) * outputs + column] = float_to_half(gate / (1.f + __expf(-gate)) * up);
      } else {
        float* const y = (float*)out + (u64)(begin + n) * outputs;
        const int row = row_block * ROW_BLOCK + g;
        if (row < outputs) y[row] = acc[i];
        if (row + 8 < outputs) y[row + 8] = acc[i + 2];
      }
    }
  };
  TeamSum<WARPS_K> join{(float4*)(shared + L::REDUCE), L::REDUCE_BYTES / 16};
  for (int group = lo / row_blocks; group * row_blocks < hi; group++) {
    const Group its = load_group(groups + 1 + group);
    __syncthreads();  // nobody reads the rows of the group before
    load_rows<L, K, GROUP, WARPS, (BITS < 16), GATHERED>(x, pair_rows, its, xs, sums);
    __syncthreads();
    const int end = min(hi, (group + 1) * row_blocks);
#pragma unroll 1
    for (int item = max(lo, group * row_blocks) + team; item < end; item += TEAMS) {
      const u16* xp = x_lane;
      const float* sp = sums_lane;
      auto advance = [&] {
        copy_async_wait<STAGES - 2>();
        __syncwarp();  // all lanes' copies have arrived, and nobody still reads the slot that is filled next
        issue();
      };
      auto consumed = [&] {
        xp += P::COLUMNS;
        sp += P::GROUPS * L::SUMS_STRIDE;
        panel += P::BYTES;
        if (panel == ring + STAGES * P::BYTES) panel = ring;
      };
      const int row_block = item - group * row_blocks;
      if (MOST <= 8 || its.count <= 8) {
        constexpr int ROWS = MOST < 8 ? MOST : 8;
        float acc[1][4] = {};
#pragma unroll 1
        for (int i = 0; i < count; i++) {
          advance();
          multiply_panel<BITS, GROUP, ZERO, ROWS>(panel, lane, X{xp, 0, sp}, acc);
          consumed();
        }
        if (join(acc)) finish(row_block, its.begin, its.count, 0, acc[0]);
      } else if constexpr (MOST > 8) {
        float acc[2][4] = {};
#pragma unroll 1
        for (int i = 0; i < count; i++) {
          advance();
          multiply_panel<BITS, GROUP, ZERO, 16>(panel, lane, X{xp, 8 * L::X_STRIDE, sp}, acc);
          consumed();
        }
        if (join(acc)) {
          finish(row_block, its.begin, its.count, 0, acc[0]);
          finish(row_block, its.begin, its.count, 1, acc[1]);
        }
      }
    }
  }
}

// ---- combine

// residual: float32 [rows, HIDDEN]; found: float32, or NARROW float16, [pairs, HIDDEN]; gain … squares: what the norm
// behind finds (norm.cuh), or null. Grid: (HIDDEN / 4 / threads, rows).
template <int HIDDEN, int TOP_K, bool NARROW>
__global__ void combine(const Row* __restrict__ rows_at, const Chunk* __restrict__ chunk, int first,
                        const int* positions, const float* shares, const void* found, float* residual,
                        const float* __restrict__ gain, const float* scales, u16* scaled, float* squares) {
  launch_dependents();
  const int row = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x;
  const bool there = i < HIDDEN / 4 && exists(rows_at, chunk, first, row);
  float4 its_gain = make_float4(0.f, 0.f, 0.f, 0.f);
  if (gain && there) its_gain = __ldg((const float4*)gain + i);
  wait_for_previous();
  const float scale = gain && there ? load_l2(scales + row) : 0.f;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (there) {
#pragma unroll
    for (int k = 0; k < TOP_K; k++) {
      const int position = load_l2(positions + row * TOP_K + k);
      const float share = load_l2(shares + row * TOP_K + k);
      const u64 at = (u64)position * (HIDDEN / 4) + i;
      float4 v;
      if constexpr (NARROW) {
        const uint2 halves = load_l2((const uint2*)found + at);
        const float2 low = half2_to_float2(halves.x), high = half2_to_float2(halves.y);
        v = make_float4(low.x, low.y, high.x, high.y);
      } else {
        v = load_l2((const float4*)found + at);
      }
      sum.x += share * v.x, sum.y += share * v.y, sum.z += share * v.z, sum.w += share * v.w;
    }
    float4* const at = (float4*)(residual + (u64)row * HIDDEN) + i;
    const float4 old = load_l2(at);
    sum.x += old.x, sum.y += old.y, sum.z += old.z, sum.w += old.w;
    *at = sum;
  }
  if (gain) {
    if (there) ((uint2*)(scaled + (u64)row * HIDDEN))[i] = scaled_four(sum, its_gain, scale);
    float square = (sum.x * sum.x + sum.y * sum.y) + (sum.z * sum.z + sum.w * sum.w);
#pragma unroll
    for (int o = 1; o < 4; o *= 2) square += __shfl_xor_sync(FULL_WARP, square, o);
    if (there && i % 4 == 0) squares[(u64)row * (HIDDEN / SQUARES) + i / 4] = square;
  }
}
