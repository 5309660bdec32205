// Linears of a mixture's experts, over groups of rows that chose the same one (moe.cu): an active expert's weights are
// read once for the rows of a group. An item is a row block of a group's expert; blocks part all items evenly, however
// many there are. Here a warp, or a team of them, has an item of its own, and a group's rows lie in shared memory.

#include "groups.cuh"
#include "linear_epilogue.cuh"

constexpr int PAIRS = STORE;  // float32 for each pair, instead of float16 for each row

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
