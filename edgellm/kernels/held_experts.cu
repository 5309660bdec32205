// Linears of a mixture's experts as in experts.cu, with a group's rows in registers: a block's warps part the columns among
// them, and each holds its own, as in a decode linear (linear.cu).

#include "groups.cuh"
#include "linear_epilogue.cuh"

constexpr int PAIRS = STORE;  // float32 for each pair, instead of float16 for each row

template <int N> struct Count {
  static constexpr int VALUE = N;
};

// What a block's shared memory holds, in this order. `moe_cuts.py` computes the same.
template <int BITS, int GROUP, int ZERO, int K, int MOST, int WARPS, int WARPS_K, int STAGES, int ABREAST> struct HeldLayout {
  using P = Panel<BITS, GROUP, ZERO>;
  static constexpr int PANELS = K / P::COLUMNS, EACH = PANELS / WARPS_K;
  static_assert(EACH * WARPS_K == PANELS, "a warp has as many panels as any other");
  static constexpr int SUMS_STRIDE = MOST < 2 ? 2 : MOST;
  static constexpr int LINE = 20;  // lanes (g, t) write rows g of columns 2t without a conflict

  static constexpr int RING = 0;
  static constexpr int SUMS = RING + WARPS * STAGES * ABREAST * P::BYTES;
  static constexpr int REDUCE = SUMS + (BITS < 16 && MOST > 8 ? K / GROUP * SUMS_STRIDE * 4 : 0);
  static constexpr int REDUCE_FLOATS = WARPS * ABREAST * MOST * LINE;
};

// `entries`: what `groups` has room for. weights … outputs: as of `experts`.
template <int BITS, int GROUP, int ZERO, int K, int MOST, int EPILOGUE, bool GATHERED, int WARPS, int WARPS_K, int STAGES,
          int ABREAST, int SETS>
__global__ void __launch_bounds__(WARPS * 32, 1)
    held_experts(const Group* groups, const int* pair_rows, const u8* __restrict__ weights, const u16* x, void* out,
                 int row_blocks, int outputs, int entries) {
  using P = Panel<BITS, GROUP, ZERO>;
  using L = HeldLayout<BITS, GROUP, ZERO, K, MOST, WARPS, WARPS_K, STAGES, ABREAST>;
  constexpr int THREADS = WARPS * 32, SIDES = WARPS / WARPS_K, SIDE_BY_SIDE = SIDES * ABREAST, EARLY = STAGES > 2 ? 1 : STAGES - 1;
  constexpr int UNIT = ABREAST * P::BYTES;
  DYNAMIC_SHARED(shared);
  float* const reduce = (float*)(shared + L::REDUCE);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int part = warp % WARPS_K, side = warp / WARPS_K, begin = part * L::EACH;

  launch_dependents();
  wait_for_previous();
  // The first groups at once, each in a lane: one look at L2 instead of several in turn.
  const Group mine = load_group(groups + min(lane, entries - 1));
  auto group_at = [&](int i) -> Group {
    if (i >= 32) return load_group(groups + i);
    return {__shfl_sync(FULL_WARP, mine.expert, i), __shfl_sync(FULL_WARP, mine.begin, i),
            __shfl_sync(FULL_WARP, mine.count, i), 0};
  };
  const u64 items = (u64)group_at(0).expert * row_blocks;
  const int lo = items * blockIdx.x / gridDim.x, hi = items * (blockIdx.x + 1) / gridDim.x;
  if (lo == hi) return;

  // The ring: panels of this warp's columns, of each of its side's items, with those of ABREAST - 1 neighbours.
  const u32 ring = L::RING + warp * STAGES * UNIT, target = shared_address(shared + ring) + lane * 16;
  int group_ahead = lo / row_blocks, item = lo + side * ABREAST, end = min(hi, (group_ahead + 1) * row_blocks), panel = 0;
  const u8* source = nullptr;
  auto aim = [&] {
    while (item >= end && end < hi) {
      group_ahead++;
      item = end + side * ABREAST;
      end = min(hi, (group_ahead + 1) * row_blocks);
    }
    if (item >= end) return;
    const u64 row_block = (u64)group_at(1 + group_ahead).expert * row_blocks + (item - group_ahead * row_blocks);
    source = weights + (row_block * L::PANELS + begin) * P::BYTES + lane * 16;
  };
  aim();
  auto issue = [&](u32 unit) {
    if (item < end) {
#pragma unroll
      for (int r = 0; r < ABREAST; r++)
        if (r == 0 || item + r < end) {
#pragma unroll
          for (int at = 0; at < P::BYTES; at += 512)
            if (at + 512 <= P::BYTES || lane * 16 < P::BYTES - at)
              stream_async(target + unit + r * P::BYTES + at, source + r * (L::PANELS * P::BYTES) + at);
        }
      source += P::BYTES;
      if (++panel == L::EACH) {
        panel = 0;
        item += SIDE_BY_SIDE;
        if (item < end) {
          source += (SIDE_BY_SIDE * L::PANELS - L::EACH) * P::BYTES;
        } else {
          aim();
        }
      }
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < EARLY; i++) issue(i * UNIT);

  bool filled = false;
  u32 used = 0, freed = (STAGES - 1) * UNIT;
  int round = 0;
  auto multiply_group = [&](int group, const Group& its, auto rows) {
    constexpr int ROWS = decltype(rows)::VALUE, TILES = (ROWS + 7) / 8;
    HeldX<BITS, GROUP, ROWS, L::SUMS_STRIDE> held[L::EACH];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const int pair = its.begin + min(tile * 8 + (g & (ROWS - 1)), its.count - 1);
      const u16* const from = x + (u64)(GATHERED ? load_l2(pair_rows + pair) : pair) * K + begin * P::COLUMNS;
#pragma unroll
      for (int i = 0; i < L::EACH; i++)
#pragma unroll
        for (int p = 0; p < P::MMAS / 2; p++) held[i].pairs[tile][p] = held[i].load(from + i * P::COLUMNS, t, p);
    }
    if (!filled) {
#pragma unroll 1
      for (int i = EARLY; i < STAGES - 1; i++) issue(i * UNIT);
      filled = true;
    }
    if constexpr (BITS < 16) {
      constexpr int CHAINS = TILES * L::EACH < 2 ? 4 : TILES * L::EACH < 8 ? 8 / (TILES * L::EACH) : 1;
      float* const sums = (float*)(shared + L::SUMS) + begin * P::GROUPS * L::SUMS_STRIDE + (2 * t & (L::SUMS_STRIDE - 1));
#pragma unroll
      for (int i = 0; i < L::EACH; i++) {
        float* const here = sums + i * P::GROUPS * L::SUMS_STRIDE;
        held[i].shared = here;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int n = 0; n < P::GROUPS; n++) {
            if (TILES > 1 && side > 0) continue;
            const float2 sum = sum_group<BITS, GROUP, CHAINS>(held[i], tile, n);
            if (TILES == 1) {
              held[i].held[n] = sum;
            } else if (g == 0) {
              *(float2*)(here + n * L::SUMS_STRIDE + tile * 8) = sum;
            }
          }
      }
      if constexpr (TILES > 1 && SIDES > 1) named_barrier<SIDES * 32>(1 + part);
      if constexpr (TILES > 1 && SIDES == 1) __syncwarp();
    }
    const int first = group * row_blocks, last = min(hi, first + row_blocks);
#pragma unroll 1
    for (int item0 = max(lo, first); item0 < last; item0 += SIDE_BY_SIDE, round++) {
      float acc[ABREAST][TILES][4] = {};
      if (item0 + side * ABREAST < last) {
#pragma unroll
        for (int i = 0; i < L::EACH; i++) {
          copy_async_wait<STAGES - 2>();
          __syncwarp();  // all lanes' copies have arrived, and nobody still reads the unit that is filled next
          issue(freed);
          multiply_panels<BITS, GROUP, ZERO, ROWS, ABREAST>(shared + ring + used, P::BYTES, lane, held[i], acc);
          freed = used;
          used += UNIT;
          if (used == STAGES * UNIT) used = 0;
        }
      }
      // With two sets of buffers, who is ahead writes into the other one.
      float* const buffer = reduce + round % SETS * L::REDUCE_FLOATS;
#pragma unroll
      for (int r = 0; r < ABREAST; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int n = tile * 8 + 2 * t + i % 2;
            if (n < its.count) buffer[((warp * ABREAST + r) * ROWS + n) * L::LINE + g + i / 2 * 8] = acc[r][tile][i];
          }
      __syncthreads();
      const Reduced<ROWS, WARPS_K, ABREAST, L::LINE> reduced{buffer};
      constexpr int LINES = EPILOGUE == SWIGLU ? 8 : 16;
#pragma unroll 1
      for (int e = threadIdx.x; e < SIDE_BY_SIDE * ROWS * LINES; e += THREADS) {
        const Element<ROWS, SIDE_BY_SIDE, LINES> at(e);
        const int column = (item0 + at.sub - first) * LINES + at.line;
        if (at.n >= its.count || item0 + at.sub >= last || column >= outputs) continue;
        const u64 to = (u64)(its.begin + at.n) * outputs + column;
        const float v = reduced(at.sub, at.n, at.line);
        if constexpr (EPILOGUE == SWIGLU) {
          const float up = reduced(at.sub, at.n, at.line + 8);
          ((u16*)out)[to] = float_to_half(v / (1.f + __expf(-v)) * up);
        } else {
          ((float*)out)[to] = v;
        }
      }
      if constexpr (SETS == 1) __syncthreads();
    }
  };
#pragma unroll 1
  for (int group = lo / row_blocks; group * row_blocks < hi; group++) {
    const Group its = group_at(1 + group);
    if (MOST <= 8 || its.count <= 8) {
      multiply_group(group, its, Count<(MOST < 8 ? MOST : 8)>{});
    } else if constexpr (MOST > 8) {
      multiply_group(group, its, Count<MOST>{});
    }
  }
}
