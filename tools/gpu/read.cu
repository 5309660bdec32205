// Reads memory and does nothing else: the time that no step can beat.

template <int UNROLL>
__global__ void __launch_bounds__(512) read_all(const uint4* __restrict__ memory, int count, unsigned int* out) {
  uint4 sum = make_uint4(0, 0, 0, 0);
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride * UNROLL) {
    uint4 v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) v[u] = i + u * stride < count ? __ldcs(memory + i + u * stride) : sum;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      sum.x ^= v[u].x;
      sum.y ^= v[u].y;
      sum.z ^= v[u].z;
      sum.w ^= v[u].w;
    }
  }
  // Never so, but the compiler cannot know.
  if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x9e3779b9u) *out = sum.x;
}
