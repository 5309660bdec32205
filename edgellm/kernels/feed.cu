// The inputs of a TensorRT plan, from what the host says of a step: see edgellm/model/trt.py for what they are.
#include "common.cuh"
#include "rows.cuh"

// One token for each of `count` rows. Grid: (count / THREADS).
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    feed_rows(const Row* __restrict__ rows, const int* last_token, int count, int* tokens, int* positions, int* past,
              int* last, int* lengths) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  const Row row = rows[i];
  tokens[i] = row.token < 0 ? last_token[row.slot] : row.token;
  positions[i] = past[i] = row.past;
  last[i] = 0;
  lengths[i] = row.past + 1;
}

// A piece of one slot's prompt, all of whose tokens there are. Grid: (tokens / THREADS).
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    feed_chunk(const Chunk* __restrict__ chunk, const int* __restrict__ ids, int* tokens, int* positions, int* past,
               int* last, int* lengths) {
  const int t = blockIdx.x * THREADS + threadIdx.x;
  const Chunk piece = *chunk;
  if (t < piece.count) {
    tokens[t] = ids[t];
    positions[t] = piece.past + t;
  }
  if (t == 0) {
    past[0] = piece.past;
    last[0] = piece.count - 1;
    lengths[0] = piece.past + piece.count;
  }
}
