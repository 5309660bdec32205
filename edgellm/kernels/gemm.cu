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
  const Chunk* chunk;
  int first, tokens;
  // Waits for the kernel before; whether there is a row at all.
  DEVICE bool start() const {
    const int count = chunk->count;
    launch_dependents();
    wait_for_previous();
    return first < count;
  }
  DEVICE int of(int token) const { return min(first + token, tokens - 1); }  // the row of x
};

// Those of a group of pairs, whose rows of x lie anywhere.
struct GroupRows {
  const int* rows;  // in shared memory
  DEVICE bool start() const { return true; }
  DEVICE int of(int token) const { return rows[token]; }
};

// A tile, or with SPLITS > 1 a part of its columns. x: float16 [any, K]; bias: float32 [16 · row_blocks] or null
// out, from its row token0 on, and at most to row `tokens`: STORE, SWIGLU float16 [tokens, outputs];
// LOGITS float32 [tokens, outputs]; RESIDUAL adds to it
// workspace: with SPLITS > 1, 1024 counters, which are 0 before and after, then the splits' sums
template <int BITS, int GROUP, int ZERO, int K, int ROW_BLOCKS, int TOKENS, int WARPS_R, int WARPS_T, int EPILOGUE,
          int STAGES, int SPLITS, class Rows>
DEVICE void gemm_tile(const Rows& rows, const u8* __restrict__ weights, const u16* x, const float* __restrict__ bias,
                      void* out, u8* workspace, int token0, int tokens, int row_blocks, int outputs) {
  using P = Panel<BITS, GROUP, ZERO>;
  using S = Stage<BITS, GROUP, ZERO, ROW_BLOCKS, TOKENS>;
  constexpr int THREADS = WARPS_R * WARPS_T * 32, PANELS = K / P::COLUMNS, ALL_STEPS = K / STEP;
  constexpr int RB = ROW_BLOCKS / WARPS_R, TILES = TOKENS / WARPS_T / 8;
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, t = lane & 3;
  const int warp_r = warp % WARPS_R, warp_t = warp / WARPS_R;
  const int row_block0 = blockIdx.y * ROW_BLOCKS;
  const int step0 = blockIdx.z * ALL_STEPS / SPLITS, steps = (blockIdx.z + 1) * ALL_STEPS / SPLITS - step0;

  auto load_weights = [&](int at) {
    u8* const to = shared + at % STAGES * S::BYTES;
    const int step = step0 + at, panel = step * STEP / P::COLUMNS, chunk_of = step % (P::COLUMNS / STEP);
#pragma unroll
    for (int i = threadIdx.x; i < ROW_BLOCKS * S::NUMBERS / 16; i += THREADS) {
      const int r = i / (S::NUMBERS / 16), piece = i % (S::NUMBERS / 16);
      const int row_block = min(row_block0 + r, row_blocks - 1);
      copy_async(to + i * 16,
                 weights + ((u64)row_block * PANELS + panel) * P::BYTES + chunk_of * S::NUMBERS + piece * 16);
    }
    if constexpr (BITS < 16) {
      constexpr int PIECES = P::SCALE_BYTES / 16;
#pragma unroll
      for (int i = threadIdx.x; i < ROW_BLOCKS * PIECES; i += THREADS) {
        const int row_block = min(row_block0 + i / PIECES, row_blocks - 1);
        copy_async(to + S::SCALES + i * 16,
                   weights + ((u64)row_block * PANELS + panel) * P::BYTES + P::NUMBER_BYTES + i % PIECES * 16);
      }
    }
  };
  auto load_x = [&](int at) {
    u8* const to = shared + at % STAGES * S::BYTES + S::X;
    const int step = step0 + at;
#pragma unroll
    for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
      const int token = i / 8, piece = i % 8;
      copy_async(to + swizzled(token, piece) * 16, x + (u64)rows.of(token) * K + step * STEP + piece * 8);
    }
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++)
    if (i < steps) load_weights(i);
  if (!rows.start()) {
    copy_async_wait<0>();
    return;
  }
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < steps) load_x(i);
    copy_async_commit();
  }

  float acc[RB][TILES][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) load_weights(step + STAGES - 1), load_x(step + STAGES - 1);
    copy_async_commit();
    const u8* const stage = shared + step % STAGES * S::BYTES;
    const u8* const numbers = stage + warp_r * RB * S::NUMBERS;
    const u8* const scales = stage + S::SCALES + warp_r * RB * P::SCALE_BYTES;
#pragma unroll
    for (int pair = 0; pair < STEP / 32; pair++) {
      uint4 b[TILES];
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const int token = (warp_t * TILES + tile) * 8 + g;
        if constexpr (BITS < 16 && GROUP == 16) {
          // Columns 4t … of each sixteen: half a piece.
          const uint2 low = *(const uint2*)(stage + S::X + swizzled(token, pair * 4 + t / 2) * 16 + t % 2 * 8);
          const uint2 high = *(const uint2*)(stage + S::X + swizzled(token, pair * 4 + 2 + t / 2) * 16 + t % 2 * 8);
          b[tile] = make_uint4(low.x, low.y, high.x, high.y);
        } else {
          b[tile] = *(const uint4*)(stage + S::X + swizzled(token, pair * 4 + t) * 16);
        }
      }
#pragma unroll
      for (int r = 0; r < RB; r++) {
        u32 a[2][4];
        OperandPair<BITS>::load(numbers + r * S::NUMBERS, lane, pair, a);
        if constexpr (BITS < 16) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const int group = (pair * 32 + i * 16) / GROUP % P::GROUPS;
            scale_operand<BITS, ZERO>(a[i], scales + r * P::SCALE_BYTES + (g * P::GROUPS + group) * P::VALUES * 2);
          }
        }
        // All tiles in turn, so that none waits for its own sum.
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma(acc[r][tile], a[0][0], a[0][1], a[0][2], a[0][3], b[tile].x, b[tile].y);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
          mma(acc[r][tile], a[1][0], a[1][1], a[1][2], a[1][3], b[tile].z, b[tile].w);
      }
    }
  }
  copy_async_wait<0>();

  if constexpr (SPLITS > 1) {
    // Each split leaves its sums; the last one to come adds them all, in order, and goes on.
    const int tile_of = blockIdx.y * gridDim.x + blockIdx.x;
    float4* const sums = (float4*)(workspace + 4096) + (u64)tile_of * SPLITS * RB * TILES * THREADS + threadIdx.x;
#pragma unroll
    for (int r = 0; r < RB; r++)
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const float(&a)[4] = acc[r][tile];
        sums[((blockIdx.z * RB + r) * TILES + tile) * THREADS] = make_float4(a[0], a[1], a[2], a[3]);
      }
    int* const last = (int*)shared;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* const counter = (int*)workspace + tile_of;
      *last = atomicAdd(counter, 1) == SPLITS - 1;
      if (*last) *counter = 0;
      __threadfence();
    }
    __syncthreads();
    if (!*last) return;
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

  if (bias) {
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
    // Eight lanes have eight neighbours of a token: whole sectors of float32. Some tiles are read, then written, or
    // each value would wait for the one before it.
    constexpr int SOME = TILES < 4 ? TILES : 4;
#pragma unroll
    for (int r = 0; r < RB; r++)
#pragma unroll
      for (int tile0 = 0; tile0 < TILES; tile0 += SOME) {
        float old[SOME][4];
#pragma unroll
        for (int write = 0; write < 2; write++)
#pragma unroll
          for (int tile = 0; tile < SOME; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int token = token0 + (warp_t * TILES + tile0 + tile) * 8 + 2 * t + i % 2;
              const int row = (row_block0 + warp_r * RB + r) * ROW_BLOCK + g + i / 2 * 8;
              if (token >= tokens || row >= outputs) continue;
              float* const at = (float*)out + (u64)token * outputs + row;
              if (write) {
                *at = EPILOGUE == LOGITS ? acc[r][tile0 + tile][i] : old[tile][i] + acc[r][tile0 + tile][i];
              } else if (EPILOGUE == RESIDUAL) {
                old[tile][i] = load_l2(at);
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
        for (int i = 0; i < 2; i++) {
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
    for (int i = threadIdx.x; i < TOKENS * (ROWS / 8); i += THREADS) {
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
template <int BITS, int GROUP, int ZERO, int K, int ROW_BLOCKS, int TOKENS, int WARPS_R, int WARPS_T, int EPILOGUE,
          int STAGES, int SPLITS>
__global__ void __launch_bounds__(WARPS_R * WARPS_T * 32, WARPS_R * WARPS_T > 4 ? 1 : 2)
    gemm(const Chunk* __restrict__ chunk, const u8* weights, const u16* x, const float* bias, void* out, u8* workspace,
         int tokens, int row_blocks, int outputs) {
  const int first = blockIdx.x * TOKENS;
  gemm_tile<BITS, GROUP, ZERO, K, ROW_BLOCKS, TOKENS, WARPS_R, WARPS_T, EPILOGUE, STAGES, SPLITS>(
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
  gemm_tile<BITS, GROUP, ZERO, K, ROW_BLOCKS, TOKENS, WARPS_R, WARPS_T, EPILOGUE, STAGES, 1>(
      GroupRows{rows}, weights + group.expert * expert_bytes, x, nullptr, out, nullptr, group.begin, group.begin + group.count,
      row_blocks, outputs);
}
