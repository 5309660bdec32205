// Linear layers for a prompt's tokens: y = x · wᵀ on tensor cores, bound by arithmetic.
//
// A block has a tile of ROW_BLOCKS · 16 rows of w and TOKENS tokens; its warps part it into WARPS_R × WARPS_T. Weights
// and x come 64 columns at a time through a ring in shared memory (cp.async) and weights become float16 in registers,
// scale · (q − zero) or scale · q + offset, rounded once; sums are float32.

#include "groups.cuh"
#include "packed.cuh"
#include "rows.cuh"

enum Epilogue { STORE = 0, RESIDUAL = 1, SWIGLU = 2, LOGITS = 3 };

constexpr int STEP = 64;  // columns at a time

template <int BITS, int GROUP, int ZERO, int ROW_BLOCKS, int TOKENS> struct Stage {
  using P = Panel<BITS, GROUP, ZERO>;
  static constexpr int NUMBERS = ROW_BLOCK * STEP * BITS / 8;  // bytes of a row block
  static constexpr int X = ROW_BLOCKS * NUMBERS;
  static constexpr int SCALES = X + TOKENS * STEP * 2;
  static constexpr int BYTES = SCALES + ROW_BLOCKS * P::SCALE_BYTES;
};

// Where 16-byte piece `piece` of a token's 64 columns lies: eight lanes that read four pieces of two neighbours meet
// no bank twice.
DEVICE int swizzled(int token, int piece) { return token * 8 + (piece ^ ((token & 1) << 2 | (token >> 1 & 3))); }

// Which rows a block has: those of a chunk, from `first` on.
struct ChunkRows {
  static constexpr bool NEIGHBOURS = true;
  const Chunk* chunk;
  int first, tokens;
  // Waits for the kernel before; whether there is a row at all.
  DEVICE bool start() const {
    const int count = chunk->count;
    launch_dependents();
    wait_for_previous();
    return first < count;
  }
  DEVICE int of(int token) const { return first + token; }  // the row of x
  DEVICE int count() const { return tokens - first; }
};

// Those of a group of pairs, whose rows of x lie anywhere.
struct GroupRows {
  static constexpr bool NEIGHBOURS = false;
  const int* rows;  // in shared memory
  DEVICE bool start() const { return true; }
  DEVICE int of(int token) const { return rows[token]; }
};

// A tile, or with SPLITS > 1 a part of its columns. x: float16 [any, K]; bias: float32 [16 · row_blocks] or null
// out, from its row token0 on, and at most to row `tokens`: STORE, SWIGLU float16 [tokens, outputs];
// LOGITS float32 [tokens, outputs]; RESIDUAL adds to it
// workspace: with SPLITS > 1, 1024 counters, which are 0 before and after, then the splits' sums
// WARPS_K teams of WARPS_R · WARPS_T warps part the columns, too, each with a ring of its own.
template <int BITS, int GROUP, int ZERO, int K, int ROW_BLOCKS, int TOKENS, int WARPS_R, int WARPS_T, int WARPS_K,
          int EPILOGUE, int STAGES, int SPLITS, class Rows>
DEVICE void gemm_tile(const Rows& rows, const u8* __restrict__ weights, const u16* x, const float* __restrict__ bias,
                      void* out, u8* workspace, int token0, int tokens, int row_blocks, int outputs) {
  using P = Panel<BITS, GROUP, ZERO>;
  using S = Stage<BITS, GROUP, ZERO, ROW_BLOCKS, TOKENS>;
  constexpr int THREADS = WARPS_R * WARPS_T * 32, PANELS = K / P::COLUMNS, ALL_STEPS = K / STEP;
  constexpr int RB = ROW_BLOCKS / WARPS_R, TILES = TOKENS / WARPS_T / 8;
  constexpr int RING = STAGES * S::BYTES, PARTS = SPLITS * WARPS_K;
  DYNAMIC_SHARED(shared);
  const int team = WARPS_K > 1 ? threadIdx.x / THREADS : 0, thread = threadIdx.x - team * THREADS;
  const int warp = thread / 32, lane = thread % 32, g = lane >> 2, t = lane & 3;
  const int warp_r = warp % WARPS_R, warp_t = warp / WARPS_R;
  const int row_block0 = blockIdx.y * ROW_BLOCKS, rows_left = min(ROW_BLOCKS, row_blocks - row_block0);
  const int part = blockIdx.z * WARPS_K + team;
  const int step0 = part * ALL_STEPS / PARTS, steps = (part + 1) * ALL_STEPS / PARTS - step0;
  const auto team_barrier = [&] {
    if constexpr (WARPS_K > 1) named_barrier<THREADS>(1 + team);
    else __syncthreads();
  };

  // A thread's copies lie at fixed distances from its first one, in global and in shared memory. What lies beyond the
  // last row block, or token, is left as it is: it is multiplied, but its products are nobody's.
  constexpr int PIECES = S::NUMBERS / 16, APART = THREADS / PIECES;
  constexpr int SCALE_PIECES = P::SCALE_BYTES / 16 + (BITS == 16), SCALE_APART = THREADS / SCALE_PIECES;
  constexpr int X_APART = THREADS / 8;
  constexpr u64 ROW_BLOCK_BYTES = u64(PANELS) * P::BYTES;
  const int piece_row = thread / PIECES, scale_row = thread / SCALE_PIECES, x_token = thread / 8;
  const u8* const panels = weights + row_block0 * ROW_BLOCK_BYTES + step0 * STEP / P::COLUMNS * P::BYTES;
  const u8* numbers_from = panels + piece_row * ROW_BLOCK_BYTES + thread % PIECES * 16 + step0 % (P::COLUMNS / STEP) * S::NUMBERS;
  const u8* scales_from = panels + scale_row * ROW_BLOCK_BYTES + thread % SCALE_PIECES * 16 + P::NUMBER_BYTES;
  u32 ring = shared_address(shared) + team * RING, pieces_to = ring + thread * 16;
  u32 x_to = ring + S::X + swizzled(x_token, thread % 8) * 16;
  kept(pieces_to), kept(x_to);

  const auto load_weights = [&](u32 stage, bool panel_ends) {
#pragma unroll
    for (int i = 0; i < (ROW_BLOCKS + APART - 1) / APART; i++)
      if (piece_row + i * APART < rows_left)
        stream_async(pieces_to + stage + i * THREADS * 16, numbers_from + i * APART * ROW_BLOCK_BYTES);
    if constexpr (BITS < 16) {
#pragma unroll
      for (int i = 0; i < (ROW_BLOCKS + SCALE_APART - 1) / SCALE_APART; i++)
        if (scale_row + i * SCALE_APART < rows_left)
          stream_async(pieces_to + stage + S::SCALES + i * THREADS * 16, scales_from + i * SCALE_APART * ROW_BLOCK_BYTES);
    }
    numbers_from += panel_ends ? P::BYTES - (P::COLUMNS / STEP - 1) * S::NUMBERS : S::NUMBERS;
    scales_from += panel_ends ? P::BYTES : 0;
  };
  // Whether the panel of a step ends with it.
  const auto ends = [&](int step) { return P::COLUMNS == STEP || (step0 + step) % 2; };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++)
    if (i < steps) load_weights(i * S::BYTES, ends(i));
  if (!rows.start()) {
    copy_async_wait<0>();
    return;
  }

  const u16* x_from = x + step0 * STEP + thread % 8 * 8;
  u32 x_rows[TOKENS / X_APART];
  int tokens_left = TOKENS;
  if constexpr (Rows::NEIGHBOURS) {
    x_from += (u64)rows.of(x_token) * K;
    tokens_left = rows.count() - x_token;
  } else {
#pragma unroll
    for (int i = 0; i < TOKENS / X_APART; i++) x_rows[i] = rows.of(x_token + i * X_APART) * K;
  }
  const auto load_x = [&](u32 stage) {
#pragma unroll
    for (int i = 0; i < TOKENS / X_APART; i++) {
      const u32 to = x_to + stage + i * X_APART * STEP * 2;
      if constexpr (Rows::NEIGHBOURS) {
        if (i * X_APART < tokens_left) copy_async(to, x_from + i * X_APART * K);
      } else {
        copy_async(to, x_from + x_rows[i]);
      }
    }
    x_from += STEP;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < steps) load_x(i * S::BYTES);
    copy_async_commit();
  }

  float acc[RB][TILES][4] = {};
  // Where a lane has its operands and scales in a stage.
  const u8* const mine = shared + team * RING;
  const u8* const numbers_at = mine + warp_r * RB * S::NUMBERS;
  const u8* const scales_at = mine + S::SCALES + warp_r * RB * P::SCALE_BYTES + g * P::GROUPS * P::VALUES * 2;
  const u8* const x_at = mine + S::X + (warp_t * TILES * 8 + g) * STEP * 2;
  u32 now = 0, before = (STAGES - 1) * S::BYTES;  // offsets of stages
  const auto load_a = [&](int pair, int r, u32(&a)[2][4]) {
    OperandPair<BITS>::load(numbers_at + now + r * S::NUMBERS, lane, pair, a);
    if constexpr (BITS < 16) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int group = (pair * 32 + i * 16) / GROUP % P::GROUPS;
        scale_operand<BITS, ZERO>(a[i], scales_at + now + r * P::SCALE_BYTES + group * P::VALUES * 2);
      }
    }
  };
  const auto load_b = [&](int pair, int tile) {
    const u8* const at = x_at + now + tile * 8 * STEP * 2;
    if constexpr (BITS < 16 && GROUP == 16) {
      // Columns 4t … of each sixteen: half a piece.
      const uint2 low = *(const uint2*)(at + swizzled(g, pair * 4 + t / 2) % 8 * 16 + t % 2 * 8);
      const uint2 high = *(const uint2*)(at + swizzled(g, pair * 4 + 2 + t / 2) % 8 * 16 + t % 2 * 8);
      return make_uint4(low.x, low.y, high.x, high.y);
    } else {
      return *(const uint4*)(at + swizzled(g, pair * 4 + t) % 8 * 16);
    }
  };
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<STAGES - 2>();
    team_barrier();
    if (step + STAGES - 1 < steps) load_weights(before, ends(step + STAGES - 1)), load_x(before);
    copy_async_commit();
#pragma unroll
    for (int pair = 0; pair < STEP / 32; pair++) {
      if constexpr (TILES <= 8) {
        uint4 b[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) b[tile] = load_b(pair, tile);
#pragma unroll
        for (int r = 0; r < RB; r++) {
          u32 a[2][4];
          load_a(pair, r, a);
          // All tiles in turn, so that none waits for its own sum.
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            mma(acc[r][tile], a[0][0], a[0][1], a[0][2], a[0][3], b[tile].x, b[tile].y);
#pragma unroll
          for (int tile = 0; tile < TILES; tile++)
            mma(acc[r][tile], a[1][0], a[1][1], a[1][2], a[1][3], b[tile].z, b[tile].w);
        }
      } else {
        // Of so many tokens a lane cannot hold x: weights first.
        u32 a[RB][2][4];
#pragma unroll
        for (int r = 0; r < RB; r++) load_a(pair, r, a[r]);
#pragma unroll
        for (int tile0 = 0; tile0 < TILES; tile0 += 2) {
          const uint4 b[2] = {load_b(pair, tile0), load_b(pair, tile0 + 1)};
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int tile = 0; tile < 2; tile++)
#pragma unroll
              for (int r = 0; r < RB; r++)
                mma(acc[r][tile0 + tile], a[r][i][0], a[r][i][1], a[r][i][2], a[r][i][3], i ? b[tile].z : b[tile].x,
                    i ? b[tile].w : b[tile].y);
        }
      }
    }
    before = now;
    now = now == (STAGES - 1) * S::BYTES ? 0 : now + S::BYTES;
  }
  // Teams pass as many barriers, though one may have a step less: where they did not, compute-sanitizer's racecheck took
  // what a barrier of the block parts for accesses without one.
  if constexpr (WARPS_K > 1 && ALL_STEPS % PARTS)
    if (steps == ALL_STEPS / PARTS) team_barrier();
  copy_async_wait<0>();

  // From here on the first team has the sums.
  if constexpr (WARPS_K > 1) {
    float4* const sums = (float4*)shared + thread;
    __syncthreads();
    if (team) {
#pragma unroll
      for (int r = 0; r < RB; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const float(&a)[4] = acc[r][tile];
          sums[(((team - 1) * RB + r) * TILES + tile) * THREADS] = make_float4(a[0], a[1], a[2], a[3]);
        }
    }
    __syncthreads();
    if (!team) {
#pragma unroll
      for (int other = 0; other < WARPS_K - 1; other++)
#pragma unroll
        for (int r = 0; r < RB; r++)
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const float4 a = sums[((other * RB + r) * TILES + tile) * THREADS];
            acc[r][tile][0] += a.x, acc[r][tile][1] += a.y, acc[r][tile][2] += a.z, acc[r][tile][3] += a.w;
          }
    }
  }

  if constexpr (SPLITS > 1) {
    // Each split leaves its sums; the last one to come adds them all, in order, and goes on.
    const int tile_of = blockIdx.y * gridDim.x + blockIdx.x;
    float4* const sums = (float4*)(workspace + 4096) + (u64)tile_of * SPLITS * RB * TILES * THREADS + thread;
    if (!team) {
#pragma unroll
      for (int r = 0; r < RB; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const float(&a)[4] = acc[r][tile];
          sums[((blockIdx.z * RB + r) * TILES + tile) * THREADS] = make_float4(a[0], a[1], a[2], a[3]);
        }
      __threadfence();
    }
    int* const last = (int*)shared;
    __syncthreads();
    if (threadIdx.x == 0) {
      int* const counter = (int*)workspace + tile_of;
      *last = atomicAdd(counter, 1) == SPLITS - 1;
      if (*last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    if (!*last) return;
    if (!team) {
#pragma unroll
      for (int r = 0; r < RB; r++)
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[r][tile][i] = 0.f;
#pragma unroll 1
      for (int split = 0; split < SPLITS; split++)
#pragma unroll
        for (int r = 0; r < RB; r++)
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            const float4 a = load_l2(sums + ((split * RB + r) * TILES + tile) * THREADS);
            acc[r][tile][0] += a.x, acc[r][tile][1] += a.y, acc[r][tile][2] += a.z, acc[r][tile][3] += a.w;
          }
    }
  }

  if (bias && !team) {
#pragma unroll
    for (int r = 0; r < RB; r++) {
      const int row_block = min(row_block0 + warp_r * RB + r, row_blocks - 1);
      const float low = bias[row_block * ROW_BLOCK + g], high = bias[row_block * ROW_BLOCK + g + 8];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        acc[r][tile][0] += low, acc[r][tile][1] += low;
        acc[r][tile][2] += high, acc[r][tile][3] += high;
      }
    }
  }
  if constexpr (EPILOGUE == RESIDUAL || EPILOGUE == LOGITS) {
    // Through shared memory, half of each warp's tokens at a time, so that a warp has whole lines in flight.
    constexpr int ROWS = ROW_BLOCKS * ROW_BLOCK, LINE = ROWS + 4, HALF = TILES / 2, FOURS = TOKENS / 2 * ROWS / 4;
    constexpr int EACH = FOURS / (THREADS * WARPS_K), SOME = EACH < 8 ? EACH : EACH % 8 ? 4 : 8;
    static_assert(EACH * THREADS * WARPS_K == FOURS && EACH % SOME == 0);
    float* const y = (float*)shared;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      __syncthreads();
      if (!team) {
#pragma unroll
        for (int r = 0; r < RB; r++)
#pragma unroll
          for (int tile = 0; tile < HALF; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++)
              y[((warp_t * HALF + tile) * 8 + 2 * t + i % 2) * LINE + (warp_r * RB + r) * ROW_BLOCK + g + i / 2 * 8] =
                  acc[r][half * HALF + tile][i];
      }
      __syncthreads();
#pragma unroll 1
      for (int at = threadIdx.x; at < FOURS; at += SOME * THREADS * WARPS_K) {
        float4 old[SOME];
#pragma unroll
        for (int write = EPILOGUE == LOGITS; write < 2; write++)
#pragma unroll
          for (int i = 0; i < SOME; i++) {
            const int four = at + i * THREADS * WARPS_K, line = four / (ROWS / 4), column = four % (ROWS / 4) * 4;
            const int token = token0 + line / (HALF * 8) * TILES * 8 + half * HALF * 8 + line % (HALF * 8);
            const int row = row_block0 * ROW_BLOCK + column;
            if (token >= tokens || row >= outputs) continue;
            float* const to = (float*)out + (u64)token * outputs + row;
            if (outputs % 4 == 0) {
              if (!write) {
                old[i] = load_l2((const float4*)to);
                continue;
              }
              float4 v = *(const float4*)(y + line * LINE + column);
              if (EPILOGUE == RESIDUAL) v = make_float4(v.x + old[i].x, v.y + old[i].y, v.z + old[i].z, v.w + old[i].w);
              *(float4*)to = v;
            } else if (write) {
              for (int j = 0; j < 4 && row + j < outputs; j++)
                to[j] = y[line * LINE + column + j] + (EPILOGUE == RESIDUAL ? load_l2(to + j) : 0.f);
            }
          }
      }
    }
  } else {
    // Through shared memory, so that a warp stores whole lines.
    constexpr int ROWS = ROW_BLOCKS * (EPILOGUE == SWIGLU ? 8 : 16), LINE = ROWS + 8;
    u16* const y = (u16*)shared;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < RB; r++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int i = 0; i < 2 && !team; i++) {
          const int token = (warp_t * TILES + tile) * 8 + 2 * t + i, block = warp_r * RB + r;
          const float low = acc[r][tile][i], high = acc[r][tile][i + 2];
          if constexpr (EPILOGUE == SWIGLU) {
            y[token * LINE + block * 8 + g] = float_to_half(low / (1.f + __expf(-low)) * high);
          } else {
            y[token * LINE + block * 16 + g] = float_to_half(low);
            y[token * LINE + block * 16 + g + 8] = float_to_half(high);
          }
        }
    __syncthreads();
    const int column0 = blockIdx.y * ROWS;
    for (int i = threadIdx.x; i < TOKENS * (ROWS / 8); i += THREADS * WARPS_K) {
      const int token = i / (ROWS / 8), column = i % (ROWS / 8) * 8;
      if (token0 + token >= tokens || column0 + column >= outputs) continue;
      u16* const to = (u16*)out + (u64)(token0 + token) * outputs + column0 + column;
      const uint4 eight = *(const uint4*)(y + token * LINE + column);
      if (outputs % 8 == 0) {
        *(uint4*)to = eight;
      } else {
        const u32 words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (int j = 0; j < 8; j++)
          if (column0 + column + j < outputs) to[j] = u16(words[j / 2] >> j % 2 * 16);
      }
    }
  }
}

// Tokens past the chunk's count: tiles without others are left alone, in mixed ones they get what comes out.
template <int BITS, int GROUP, int ZERO, int K, int ROW_BLOCKS, int TOKENS, int WARPS_R, int WARPS_T, int WARPS_K,
          int EPILOGUE, int STAGES, int SPLITS>
__global__ void __launch_bounds__(WARPS_R * WARPS_T * WARPS_K * 32, WARPS_R * WARPS_T * WARPS_K > 4 ? 1 : 2)
    gemm(const Chunk* __restrict__ chunk, const u8* weights, const u16* x, const float* bias, void* out, u8* workspace,
         int tokens, int row_blocks, int outputs) {
  const int first = blockIdx.x * TOKENS;
  gemm_tile<BITS, GROUP, ZERO, K, ROW_BLOCKS, TOKENS, WARPS_R, WARPS_T, WARPS_K, EPILOGUE, STAGES, SPLITS>(
      ChunkRows{chunk, first, tokens}, weights, x, bias, out, workspace, first, tokens, row_blocks, outputs);
}

// Of a mixture of experts, see moe.cu: a tile of tokens is a group, whose expert's weights it multiplies. GATHERED: x
// has a row for each token, otherwise, as `out`, for each pair.
template <int BITS, int GROUP, int ZERO, int K, int ROW_BLOCKS, int TOKENS, int WARPS_R, int WARPS_T, int EPILOGUE,
          bool GATHERED, int STAGES>
__global__ void __launch_bounds__(WARPS_R * WARPS_T * 32, WARPS_R * WARPS_T > 4 ? 1 : 2)
    expert_gemm(const Group* groups, const int* pair_rows, const u8* weights, const u16* x, void* out, int row_blocks,
                int outputs) {
  using P = Panel<BITS, GROUP, ZERO>;
  __shared__ int rows[TOKENS];
  launch_dependents();
  wait_for_previous();
  if (int(blockIdx.x) >= load_group(groups).expert) return;
  const Group group = load_group(groups + 1 + blockIdx.x);
  for (int i = threadIdx.x; i < TOKENS; i += WARPS_R * WARPS_T * 32) {
    const int pair = group.begin + min(i, group.count - 1);
    rows[i] = GATHERED ? load_l2(pair_rows + pair) : pair;
  }
  __syncthreads();
  const u64 expert_bytes = (u64)row_blocks * (K / P::COLUMNS) * P::BYTES;
  gemm_tile<BITS, GROUP, ZERO, K, ROW_BLOCKS, TOKENS, WARPS_R, WARPS_T, 1, EPILOGUE, STAGES, 1>(
      GroupRows{rows}, weights + group.expert * expert_bytes, x, nullptr, out, nullptr, group.begin, group.begin + group.count,
      row_blocks, outputs);
}
