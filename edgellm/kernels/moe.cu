// Mixtures of experts: what comes of a router's scores, and of what the experts found.
//
//   route     each row's experts and their shares; the rows of an expert, in groups of at most MOST
//   (linears over groups: experts.cu, held_experts.cu, or gemm.cu's expert_gemm where experts have many rows each)
//   combine   residual += Σ share · what the row's experts found
//
// A pair is a row with one of its experts. Groups, and pairs in them, lie in the order of experts, then of rows: the
// same from run to run. Grids do not depend on who was chosen, so that one graph serves all steps.

#include "groups.cuh"
#include "norm.cuh"
#include "rows.cuh"

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
