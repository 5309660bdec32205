// The small kernels between products: embedding, RMSNorm, the last row of a chunk, a permutation of columns.
#include "norm.cuh"
#include "rows.cuh"

enum TableKind { FLOAT32, FLOAT16, BFLOAT16, INT8, INT4 };

// Four neighbouring elements of a table's row, from element `at` (a multiple of 4).
template <int KIND, int GROUP, bool OFFSETS>
DEVICE float4 four_of(const u8* __restrict__ table, const u16* __restrict__ scales, const u16* __restrict__ offsets, u64 at) {
  if constexpr (KIND == FLOAT32) return __ldg((const float4*)table + at / 4);
  if constexpr (KIND == FLOAT16) {
    uint2 w = __ldg((const uint2*)table + at / 4);
    float2 a = half2_to_float2(w.x), b = half2_to_float2(w.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
  if constexpr (KIND == BFLOAT16) {
    uint2 w = __ldg((const uint2*)table + at / 4);
    return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u), __uint_as_float(w.y << 16),
                       __uint_as_float(w.y & 0xffff0000u));
  }
  if constexpr (KIND == INT8 || KIND == INT4) {
    float q[4];
    if constexpr (KIND == INT8) {
      u32 w = __ldg((const u32*)table + at / 4);
#pragma unroll
      for (int i = 0; i < 4; i++) q[i] = float((signed char)(w >> 8 * i));
    } else {
      u32 w = __ldg((const u16*)table + at / 4);
#pragma unroll
      for (int i = 0; i < 4; i++) q[i] = float((w >> 4 * i) & 15);
    }
    float s = half_to_float(__ldg(scales + at / GROUP));
    float o = OFFSETS ? half_to_float(__ldg(offsets + at / GROUP)) : 0.f;
    return make_float4(q[0] * s + o, q[1] * s + o, q[2] * s + o, q[3] * s + o);
  }
}

// Residual rows float32 [rows, HIDDEN] of a decode step's tokens, and what the norm behind finds (norm.cuh): each
// row's scale is of its own rms. A block for each row.
template <int KIND, int HIDDEN, int GROUP, bool OFFSETS, int THREADS>
__global__ void __launch_bounds__(THREADS)
    embed_rows(const Row* __restrict__ rows, const int* last_token, const u8* table, const u16* scales,
               const u16* offsets, float epsilon, float* out, const float* __restrict__ gain, float* norm_scales,
               u16* scaled, float* squares) {
  constexpr int FOURS = HIDDEN / 4, EACH = (FOURS + THREADS - 1) / THREADS;
  launch_dependents();
  const Row row = rows[blockIdx.x];
  float4 g[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x;
    if (i < FOURS) g[e] = __ldg((const float4*)gain + i);
  }
  wait_for_previous();
  if (row.slot < 0) return;
  const int token = row.token < 0 ? load_l2(last_token + row.slot) : row.token;
  float4 v[EACH];
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x;
    v[e] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (i < FOURS) v[e] = four_of<KIND, GROUP, OFFSETS>(table, scales, offsets, u64(token) * HIDDEN + 4 * i);
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x;
    float square = v[e].x * v[e].x + v[e].y * v[e].y + v[e].z * v[e].z + v[e].w * v[e].w;
    sum += square;
    square += __shfl_xor_sync(FULL_WARP, square, 1);
    square += __shfl_xor_sync(FULL_WARP, square, 2);
    if (i < FOURS && i % 4 == 0) squares[u64(blockIdx.x) * (HIDDEN / SQUARES) + i / 4] = square;
  }
  const float scale = scale_of(rsqrtf(block_sum<THREADS>(sum) * (1.f / HIDDEN) + epsilon));
  if (threadIdx.x == 0) norm_scales[blockIdx.x] = scale;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = e * THREADS + threadIdx.x;
    if (i >= FOURS) continue;
    ((float4*)(out + u64(blockIdx.x) * HIDDEN))[i] = v[e];
    ((uint2*)(scaled + u64(blockIdx.x) * HIDDEN))[i] = scaled_four(v[e], g[e], scale);
  }
}

// Residual rows float32 [bucket, HIDDEN] of a chunk's tokens. Grid: (HIDDEN / 4 / threads, bucket).
template <int KIND, int HIDDEN, int GROUP, bool OFFSETS>
__global__ void embed_chunk(const Chunk* __restrict__ chunk, const int* __restrict__ ids, const u8* table,
                            const u16* scales, const u16* offsets, float* out) {
  launch_dependents();
  int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  int count = chunk->count;
  wait_for_previous();
  if (int(blockIdx.y) >= count || i >= HIDDEN) return;
  float4 v = four_of<KIND, GROUP, OFFSETS>(table, scales, offsets, u64(ids[blockIdx.y]) * HIDDEN + i);
  *(float4*)(out + u64(blockIdx.y) * HIDDEN + i) = v;
}

// x · gain / sqrt(mean(x²) + epsilon) → float16 [rows, HIDDEN], a block for each row. With a chunk, rows past its
// end are left alone. `scales`: for what the norm behind finds (norm.cuh), or null.
template <int HIDDEN, int THREADS>
__global__ void __launch_bounds__(THREADS)
    rms_norm(const Chunk* __restrict__ chunk, const float* x, const float* __restrict__ gain, float epsilon, u16* out,
             float* scales) {
  constexpr int FOURS = HIDDEN / 4, EACH = (FOURS + THREADS - 1) / THREADS;
  launch_dependents();
  int count = chunk ? chunk->count : int(gridDim.x);
  float4 g[EACH], v[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    int i = e * THREADS + threadIdx.x;
    if (i < FOURS) g[e] = __ldg((const float4*)gain + i);
  }
  wait_for_previous();
  if (int(blockIdx.x) >= count) return;
  const float4* row = (const float4*)(x + u64(blockIdx.x) * HIDDEN);
  float sum = 0.f;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    int i = e * THREADS + threadIdx.x;
    v[e] = i < FOURS ? load_l2(row + i) : make_float4(0.f, 0.f, 0.f, 0.f);
    sum += v[e].x * v[e].x + v[e].y * v[e].y + v[e].z * v[e].z + v[e].w * v[e].w;
  }
  const float r = rsqrtf(block_sum<THREADS>(sum) * (1.f / HIDDEN) + epsilon);
  if (scales && threadIdx.x == 0) scales[blockIdx.x] = scale_of(r);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    int i = e * THREADS + threadIdx.x;
    if (i < FOURS)
      ((uint2*)(out + u64(blockIdx.x) * HIDDEN))[i] =
          make_uint2(pack_half2_saturated(v[e].x * r * g[e].x, v[e].y * r * g[e].y),
                     pack_half2_saturated(v[e].z * r * g[e].z, v[e].w * r * g[e].w));
  }
}

// A chunk's last row of the residual (float32) and of attention's output (float16), each to row 0 of its own place, and
// the scale for what the norm behind finds (norm.cuh). One block.
template <int HIDDEN, int WIDTH, int THREADS>
__global__ void __launch_bounds__(THREADS)
    last_row(const Chunk* __restrict__ chunk, const float* x, const u16* h, float epsilon, float* x_out, u16* h_out,
             float* scales) {
  launch_dependents();
  const int row = chunk->count - 1;
  wait_for_previous();
  if (row < 0) return;
  float sum = 0.f;
#pragma unroll 4
  for (int i = threadIdx.x; i < HIDDEN / 4; i += THREADS) {
    const float4 v = load_l2((const float4*)(x + u64(row) * HIDDEN) + i);
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    ((float4*)x_out)[i] = v;
  }
  for (int i = threadIdx.x; i < WIDTH / 8; i += THREADS)
    ((uint4*)h_out)[i] = load_l2((const uint4*)(h + u64(row) * WIDTH) + i);
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) *scales = scale_of(rsqrtf(sum * (1.f / HIDDEN) + epsilon));
}

// out[row, k] = x[row, order[k]], float16 [rows, K]: for weights whose groups are not of neighbouring columns.
// Grid: (K / threads, rows).
template <int K>
__global__ void permute_columns(const int* __restrict__ order, const u16* x, u16* out) {
  launch_dependents();
  int k = blockIdx.x * blockDim.x + threadIdx.x;
  int from = k < K ? __ldg(order + k) : 0;
  wait_for_previous();
  if (k >= K) return;
  out[u64(blockIdx.y) * K + k] = load_l2(x + u64(blockIdx.y) * K + from);
}
