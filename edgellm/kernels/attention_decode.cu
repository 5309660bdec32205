// Attention of a decode step: one new token for each row, over all that its slot holds.
//
// A row's tokens are cut into tiles of 16. Laid end to end, the tiles of all rows, KV head after KV head, are dealt evenly
// to the grid's blocks, and a block's tiles of a row in turn to its warps: a row's tiles may lie in several blocks, which
// then leave partial sums, and a block's tiles in several rows. The grid does not depend on the lengths. Where there are
// enough blocks for each row and head to have some of its own, they do, unless one of them would have much more to do
// than with all dealt evenly: a second row is a second beginning and end. `attention_decode.py` has the same arithmetic.
//
// With compute capability 9 each row and KV head has a cluster of CLUSTER blocks instead, among which its tiles are
// dealt; their sums meet in the first block's shared memory, which takes a fraction of the way through L2.
#include "attention_tile.cuh"
#include "rows.cuh"

constexpr int SECOND_ROW = 3;  // what a second row takes a block, in tiles of each warp

// D: head size. QUERIES: query heads of a KV head. CLUSTER: blocks of one, 1 where there are none.
template <int D, int QUERIES, int KV_HEADS, bool INT8, bool NORM, int WARPS, int STAGES, int CLUSTER>
DEVICE void attend(int row_count, int max_seq, const Row* __restrict__ rows, const u16* qkv,
                   const float* __restrict__ angles, const float* __restrict__ q_gain, const float* __restrict__ k_gain,
                   float epsilon, float scale, u8* cache, u16* scales, u16* out,
                   float* partials, u32* counters) {
  using Cache = CacheRow<D, INT8>;
  constexpr int ROUND = TILE * WARPS, HEADS = KV_HEADS * QUERIES, WIDTH = (HEADS + 2 * KV_HEADS) * D;
  constexpr int MATRIX = TILE * Cache::STRIDE, SCALES = INT8 ? 2 * TILE * 2 : 0, STAGE = 2 * MATRIX + SCALES;
  constexpr int GATHERED = QUERIES * D / 4 + QUERIES;
  constexpr int PARTIAL = (QUERIES * (D + 2) + 3) / 4 * 4;  // floats
  constexpr int ITEMS = (QUERIES + 2 + WARPS - 1) / WARPS;
  static_assert(D % 16 == 0 && D <= 128);

  DYNAMIC_SHARED(ring);
  __shared__ __align__(16) Queries<D, QUERIES, INT8> queries;
  __shared__ __align__(16) u8 fresh[2][Cache::BYTES];  // the new token's key and value, as the cache holds them
  __shared__ u16 fresh_scale[2];
  __shared__ __align__(16) float sums[WARPS][QUERIES][D + 8];
  __shared__ float2 statistics[WARPS][QUERIES];  // reference, sum of 2^(logit − reference)
  __shared__ bool is_last;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // Lane i knows row i. In a cluster there is one row, which every lane knows.
  const Row mine = CLUSTER > 1        ? rows[blockIdx.z]
                   : lane < row_count ? rows[lane]
                                      : Row{-1, 0, 0, 0};
  const int row_tiles = mine.slot < 0 ? 0 : mine.past / TILE + 1;
  int ends = row_tiles;
  if constexpr (CLUSTER == 1) {
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      int before = __shfl_up_sync(FULL_WARP, ends, o);
      if (lane >= o) ends += before;
    }
  }
  const int total = CLUSTER > 1 ? row_tiles : __shfl_sync(FULL_WARP, ends, 31);
  const int all = CLUSTER > 1 ? total : total * KV_HEADS;
  int share = (all + int(gridDim.x) - 1) / int(gridDim.x);
  int begin = int(blockIdx.x) * share, end = min(begin + share, all);
  int own = -1;  // the first of the blocks that have this row and head to themselves
  if constexpr (CLUSTER == 1) {
    const u32 active = __ballot_sync(FULL_WARP, row_tiles > 0);
    const int row_total = __popc(active), units = row_total * KV_HEADS;
    if (units > 0 && units <= int(gridDim.x)) {
      const int each = int(gridDim.x) / units, longest = int(__reduce_max_sync(FULL_WARP, u32(row_tiles)));
      if ((longest + each - 1) / each <= share + SECOND_ROW * WARPS) {
        const int unit = int(blockIdx.x) / each, head = unit / row_total;
        const bool is_row = row_tiles > 0 && __popc(active & ((1u << lane) - 1)) == unit - head * row_total;
        const int row = __ffs(__ballot_sync(FULL_WARP, is_row)) - 1;
        const int here = __shfl_sync(FULL_WARP, row_tiles, row);
        const int first = head * total + __shfl_sync(FULL_WARP, ends, row) - here;
        own = unit * each;
        share = (here + each - 1) / each;
        begin = first + (int(blockIdx.x) - own) * share;
        end = unit < units ? min(begin + share, first + here) : begin;
      }
    }
  }
  if (CLUSTER > 1 && total > 0) cluster_arrive();  // this block's shared memory is there
  if (begin >= end) {
    wait_for_previous();
    launch_dependents();
    if (CLUSTER > 1 && total > 0) {
      cluster_wait();
      cluster_arrive();
    }
    return;
  }

  // The row and head that a tile belongs to, which has the tiles from `begin` to `end`.
  struct Stretch {
    int row, head, slot, past, begin, end;
  };
  auto stretch_of = [&](int tile) {
    if constexpr (CLUSTER > 1) {
      return Stretch{int(blockIdx.z), int(blockIdx.y), mine.slot, mine.past, 0, total};
    } else {
      const int head = tile / total, before = head * total;
      const int row = __ffs(__ballot_sync(FULL_WARP, ends > tile - before)) - 1;
      const int until = before + __shfl_sync(FULL_WARP, ends, row);
      return Stretch{row,
                     head,
                     __shfl_sync(FULL_WARP, mine.slot, row),
                     __shfl_sync(FULL_WARP, mine.past, row),
                     until - __shfl_sync(FULL_WARP, row_tiles, row),
                     until};
    }
  };

  // `coming`: the first of the block's next tiles that are not on their way yet, one for each warp as long as the row has
  // some. A tile is one stretch of the cache; the new token is not there yet.
  u8* const my_ring = ring + warp * STAGES * STAGE;
  int coming = begin, coming_end = begin, cached = 0;  // tokens of the tile and after it that the cache has
  const u8* source = nullptr;
  const u16* source_scales = nullptr;  // of keys in lanes 0 and 1, of values in 2 and 3
  auto aim = [&](const Stretch& s) {
    const int token = (coming - s.begin + warp) * TILE;
    const u64 at = cache_tile<KV_HEADS>(max_seq, s.slot, s.head, token);
    source = cache + at * (2 * Cache::VALUES) + lane * 16;
    if (INT8) source_scales = scales + at * (2 * TILE) + lane * 8;
    cached = s.past - token;
    coming_end = min(s.end, end);
  };
  auto fetch = [&](int offset) {
    if (coming < end) {
      if (coming == coming_end) aim(stretch_of(coming));
      auto copy = [&](auto wanted) {
        u8* const stage = my_ring + offset;
#pragma unroll
        for (int j = 0; j < (TILE * Cache::UNITS + 31) / 32; j++) {
          const int unit = j * 32 + lane;
          // Where a round is whole tokens, the same place in each.
          const int in_tile = 32 % Cache::UNITS ? unit / Cache::UNITS : lane / Cache::UNITS + j * (32 / Cache::UNITS);
          if (TILE * Cache::UNITS % 32 == 0 || unit < TILE * Cache::UNITS) {
            u8* const to = stage + in_tile * Cache::STRIDE + (unit - in_tile * Cache::UNITS) * 16;
            copy_async(to, source + j * 512, wanted(in_tile));
            copy_async(to + MATRIX, source + Cache::VALUES + j * 512, wanted(in_tile));
          }
        }
        if (INT8 && lane < 4) copy_async(stage + 2 * MATRIX + lane * 16, source_scales);
      };
      // Values that have no weight must be finite: bytes are, float16s are fetched as zeros.
      if (coming + warp >= coming_end) {
      } else if (INT8 ? cached > 0 : cached >= TILE) {
        copy([](int) { return true; });
      } else if (!INT8) {
        copy([&](int in_tile) { return in_tile < cached; });
      }
      coming = min(coming + WARPS, coming_end), cached -= ROUND;
      source += WARPS * KV_HEADS * (2 * Cache::VALUES), source_scales += WARPS * KV_HEADS * (2 * TILE);
    }
    copy_async_commit();
  };
  Stretch stretch = stretch_of(begin);
  // Ahead of the ring: behind it they would arrive when it has.
  Pairs<D> q_gains, k_gains, turn;
  if (NORM) {
    load_pairs<D>(q_gains, lane, [&](int j) { return __ldg(q_gain + j); });
    load_pairs<D>(k_gains, lane, [&](int j) { return __ldg(k_gain + j); });
  }
  load_pairs<D>(turn, lane, [&](int j) { return __ldg(angles + u64(stretch.past) * D + j); });
  aim(stretch);
  fetch(0);

  bool waited = false;
  int offset = 0;  // of the ring's stage that is next
  for (int tile = begin; tile < end;) {
    if (tile != begin) {
      stretch = stretch_of(tile);
      load_pairs<D>(turn, lane, [&](int j) { return __ldg(angles + u64(stretch.past) * D + j); });
    }
    const int row = stretch.row, head = stretch.head, slot = stretch.slot, past = stretch.past;
    const int row_begin = stretch.begin, row_end = stretch.end;
    const int until = min(end, row_end);
    const bool whole = tile == row_begin && until == row_end, has_new = until == row_end;
    if (!waited) wait_for_previous();

    // Queries, the new key and the new value: a warp for each.
    Pairs<D> item[ITEMS];
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
      const int which = n * WARPS + warp;
      const int in_row = which < QUERIES ? head * QUERIES + which : HEADS + (which - QUERIES) * KV_HEADS + head;
      if (which < QUERIES + 2)
        load_pairs<D>(item[n], lane, [&](int j) {
          return half_to_float(load_l2(qkv + u64(row) * WIDTH + in_row * D + j));
        });
    }
    // The rest of the ring not sooner: queries would arrive when all of it has.
    if (!waited) {
#pragma unroll
      for (int s = 1; s < STAGES; s++) fetch(s * STAGE);
    }
    waited = true;
#pragma unroll
    for (int n = 0; n < ITEMS; n++) {
      const int which = n * WARPS + warp;
      if (which < QUERIES) {
        if (NORM) normalise<D>(item[n], q_gains, epsilon);
        rotate<D>(item[n], turn);
        queries.store(which, item[n], lane, scale);
      } else if (which < QUERIES + 2 && has_new) {
        const int kind = which - QUERIES;
        if (kind == 0) {
          if (NORM) normalise<D>(item[n], k_gains, epsilon);
          rotate<D>(item[n], turn);
        }
        const u64 at = cache_place<KV_HEADS>(max_seq, slot, head, past, kind);
        u8* const to = cache + at * Cache::BYTES;
        if constexpr (INT8) {
          const u16 s = quantise<D>(item[n], lane, [&](int j, u8 code) { to[j] = fresh[kind][j] = code; });
          if (lane == 0) scales[at] = fresh_scale[kind] = s;
        } else {
          store_halves<D>((u16*)to, item[n], lane);
          store_halves<D>((u16*)fresh[kind], item[n], lane);
        }
      }
    }
    __syncthreads();
    launch_dependents();  // not sooner: what the next kernel asks for early would be ahead of the queries

    TileSums<D, QUERIES, INT8> tiles(queries, lane);
    int there = past + 1 - (tile - row_begin + warp) * TILE;  // tokens of the tile and after it
#pragma unroll 1
    for (; tile < until; tile += WARPS, there -= ROUND) {
      copy_async_wait<STAGES - 1>();
      __syncwarp();
      if (tile + warp < until) {
        u8* const stage = my_ring + offset;
        if (there <= TILE) {
          u8* const to = stage + (there - 1) * Cache::STRIDE;
          if (lane < 2 * Cache::UNITS) {
            const int kind = lane / Cache::UNITS, part = lane % Cache::UNITS;
            *(uint4*)(to + kind * MATRIX + part * 16) = *(const uint4*)(fresh[kind] + part * 16);
          }
          if (INT8 && lane < 2) *(u16*)(stage + 2 * MATRIX + (lane * TILE + there - 1) * 2) = fresh_scale[lane];
          __syncwarp();
        }
        tiles.take(stage, there);
      }
      __syncwarp();
      fetch(offset);
      offset = offset == (STAGES - 1) * STAGE ? 0 : offset + STAGE;
    }
    tile = until;
    tiles.leave(sums[warp], statistics[warp]);
    __syncthreads();

    // Blocks with tiles of this row, and the place of this block's partial sums: a block has at most two rows that
    // are not whole, its first and its last.
    const int first_block = own >= 0 ? own : row_begin / share;
    const int last_block = own >= 0 ? own + (row_end - row_begin - 1) / share : (row_end - 1) / share;
    auto place = [&](int block) {
      const int second = own < 0 && block == first_block && row_begin != block * share;
      return partials + u64(block * 2 + second) * PARTIAL;
    };
    u16* const to = out + u64(row) * HEADS * D + head * QUERIES * D;
    auto finish = [&](int unit, float4 v, float total_sum) {
      const float r = 1.f / total_sum;
      ((uint2*)to)[unit] = make_uint2(pack_half2(v.x * r, v.y * r), pack_half2(v.z * r, v.w * r));
    };
    float4* const gathered = (float4*)(ring + WARPS * STAGES * STAGE);  // of each block its sums, then the statistics
    if (CLUSTER > 1) cluster_wait();
    for (int unit = threadIdx.x; unit < QUERIES * D / 4; unit += WARPS * 32) {
      const int which = unit / (D / 4), d = unit % (D / 4) * 4;
      float m = NOTHING, total_sum = 0.f;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < WARPS; w++) m = fmaxf(m, statistics[w][which].x);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float f = exp2_fast(statistics[w][which].x - m);
        const float4 a = *(const float4*)&sums[w][which][d];
        total_sum += f * statistics[w][which].y;
        v.x += f * a.x, v.y += f * a.y, v.z += f * a.z, v.w += f * a.w;
      }
      if constexpr (CLUSTER > 1) {
        float4* const place = gathered + blockIdx.x * GATHERED;
        store_cluster(cluster_address(shared_address(place + unit), 0), v);
        if (d == 0)
          store_cluster(cluster_address(shared_address(place + QUERIES * D / 4 + which), 0),
                        make_float4(m, total_sum, 0.f, 0.f));
      } else if (whole) {
        finish(unit, v, total_sum);
      } else {
        float* const p = place(blockIdx.x);
        ((float4*)p)[unit] = v;
        if (d == 0) ((float2*)(p + QUERIES * D))[which] = make_float2(m, total_sum);
      }
    }
    if constexpr (CLUSTER > 1) {
      cluster_arrive();
      if (blockIdx.x != 0) return;
      cluster_wait();
      for (int unit = threadIdx.x; unit < QUERIES * D / 4; unit += WARPS * 32) {
        const int which = unit / (D / 4);
        float m = NOTHING, total_sum = 0.f;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int block = 0; block < CLUSTER; block++)
          if (block <= last_block) m = fmaxf(m, gathered[block * GATHERED + QUERIES * D / 4 + which].x);
#pragma unroll
        for (int block = 0; block < CLUSTER; block++)
          if (block <= last_block) {
            const float4 s = gathered[block * GATHERED + QUERIES * D / 4 + which];
            const float4 a = gathered[block * GATHERED + unit];
            const float f = exp2_fast(s.x - m);
            total_sum += f * s.y;
            v.x += f * a.x, v.y += f * a.y, v.z += f * a.z, v.w += f * a.w;
          }
        finish(unit, v, total_sum);
      }
      return;
    }
    if (whole) continue;

    // Whoever comes last adds up; the counter goes back to 0.
    __syncthreads();
    if (threadIdx.x == 0) {
      const u32 others = last_block - first_block;
      is_last = count_arrival(counters + row * KV_HEADS + head, others) == others;
    }
    __syncthreads();
    if (!is_last) continue;
    for (int unit = threadIdx.x; unit < QUERIES * D / 4; unit += WARPS * 32) {
      const int which = unit / (D / 4);
      float m = NOTHING, total_sum = 0.f;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int block = first_block; block <= last_block; block++) {
        const float* const p = place(block);
        const float2 s = load_l2((const float2*)(p + QUERIES * D) + which);
        const float4 a = load_l2((const float4*)p + unit);
        const float next = fmaxf(m, s.x), f = exp2_fast(m - next), h = exp2_fast(s.x - next);
        m = next;
        total_sum = total_sum * f + s.y * h;
        v.x = v.x * f + a.x * h, v.y = v.y * f + a.y * h, v.z = v.z * f + a.z * h, v.w = v.w * f + a.w * h;
      }
      finish(unit, v, total_sum);
    }
  }
}

// Shared memory, dynamic: a ring of STAGES tiles for each warp. Grid: blocks, BLOCKS on a multiprocessor. At most 32
// rows.
template <int D, int QUERIES, int KV_HEADS, bool INT8, bool NORM, int WARPS, int STAGES, int BLOCKS>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    attention_decode(int row_count, int max_seq, const Row* __restrict__ rows, const u16* qkv,
                     const float* __restrict__ angles, const float* __restrict__ q_gain, const float* __restrict__ k_gain,
                     float epsilon, float scale, u8* cache, u16* scales, u16* out, float* partials, u32* counters) {
  attend<D, QUERIES, KV_HEADS, INT8, NORM, WARPS, STAGES, 1>(row_count, max_seq, rows, qkv, angles, q_gain, k_gain,
                                                             epsilon, scale, cache, scales, out, partials, counters);
}

// The ring, then room for every block's sums. Grid: (CLUSTER, KV_HEADS, rows).
#if __CUDA_ARCH__ >= 900
template <int D, int QUERIES, int KV_HEADS, bool INT8, bool NORM, int WARPS, int STAGES, int CLUSTER>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(WARPS * 32, 1)
    attention_decode_cluster(int max_seq, const Row* __restrict__ rows, const u16* qkv, const float* __restrict__ angles,
                             const float* __restrict__ q_gain, const float* __restrict__ k_gain, float epsilon,
                             float scale, u8* cache, u16* scales, u16* out) {
  attend<D, QUERIES, KV_HEADS, INT8, NORM, WARPS, STAGES, CLUSTER>(int(gridDim.z), max_seq, rows, qkv, angles, q_gain,
                                                                   k_gain, epsilon, scale, cache, scales, out, nullptr,
                                                                   nullptr);
}
#endif
