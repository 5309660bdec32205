// What a perception network's layer does to the device's memory: reads all of an array, computes, writes it all.

template <int ROUNDS>
__global__ void __launch_bounds__(256) perceive(const float4* __restrict__ in, float4* __restrict__ out, int count) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) {
    float4 v = in[i];
#pragma unroll 8
    for (int r = 0; r < ROUNDS; r++) {
      v.x = v.x * 0.999f + 0.001f;
      v.y = v.y * 0.998f + 0.002f;
      v.z = v.z * 0.997f + 0.003f;
      v.w = v.w * 0.996f + 0.004f;
    }
    out[i] = v;
  }
}
