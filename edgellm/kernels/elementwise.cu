// The small kernels between products: embedding, RMSNorm, the last row of a chunk, a permutation of columns.
#include "common.cuh"
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

// Residual rows float32 [rows, HIDDEN] of a decode step's tokens, and the sums of squares of 16 neighbours that a
// linear's norm wants, float32 [rows, HIDDEN / 16]. Grid: (HIDDEN / 4 / threads, rows).
template <int KIND, int HIDDEN, int GROUP, bool OFFSETS>
__global__ void embed_rows(const Row* __restrict__ rows, const int* last_token, const u8* table, const u16* scales,
                           const u16* offsets, float* out, float* squares) {
  launch_dependents();
  Row row = rows[blockIdx.y];
  int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  wait_for_previous();
  if (row.slot < 0 || i >= HIDDEN) return;
  int token = row.token < 0 ? load_l2(last_token + row.slot) : row.token;
  float4 v = four_of<KIND, GROUP, OFFSETS>(table, scales, offsets, u64(token) * HIDDEN + i);
  *(float4*)(out + u64(blockIdx.y) * HIDDEN + i) = v;
  // Four neighbouring lanes have 16 columns, and leave or stay together.
  u32 four = 0xfu << (threadIdx.x & 28);
  float sum = v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  sum += __shfl_xor_sync(four, sum, 1);
  sum += __shfl_xor_sync(four, sum, 2);
  if (threadIdx.x % 4 == 0) squares[u64(blockIdx.y) * (HIDDEN / 16) + i / 16] = sum;
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
// end are left alone.
template <int HIDDEN, int THREADS>
__global__ void __launch_bounds__(THREADS)
    rms_norm(const Chunk* __restrict__ chunk, const float* x, const float* __restrict__ gain, float epsilon, u16* out) {
  constexpr int FOURS = HIDDEN / 4, EACH = (FOURS + THREADS - 1) / THREADS;
  __shared__ float sums[THREADS / 32];
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
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) sum += sums[w];
  float r = rsqrtf(sum * (1.f / HIDDEN) + epsilon);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    int i = e * THREADS + threadIdx.x;
    if (i < FOURS)
      ((uint2*)(out + u64(blockIdx.x) * HIDDEN))[i] =
          make_uint2(pack_half2_saturated(v[e].x * r * g[e].x, v[e].y * r * g[e].y),
                     pack_half2_saturated(v[e].z * r * g[e].z, v[e].w * r * g[e].w));
  }
}

// A chunk's last row of the residual (float32) and of attention's output (float16), each to row 0 of its own place.
template <int HIDDEN, int WIDTH>
__global__ void last_row(const Chunk* __restrict__ chunk, const float* x, const u16* h, float* x_out, u16* h_out) {
  launch_dependents();
  int row = chunk->count - 1;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_previous();
  if (row < 0) return;
  if (i < HIDDEN / 4) ((float4*)x_out)[i] = load_l2((const float4*)(x + u64(row) * HIDDEN) + i);
  if (i < WIDTH / 8) ((uint4*)h_out)[i] = load_l2((const uint4*)(h + u64(row) * WIDTH) + i);
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
