// AdamW over many tensors in one launch, and the sum of squares of what each master weight was changed by.
//
// The file includes no header, so NVRTC, nvcc and g++ (with thread_shim.h) compile the same text. trainer/kernels/adamw.py
// launches it. Memory bounds the kernel: 28 bytes a parameter, and 2 for a low-precision copy.

// Columns of the table that describes the tensors, one row each. Pointers and counts are 64-bit. The chunks of a tensor
// are the blocks from FIRST_BLOCK on; one more row holds the number of all blocks there.
enum { GRADIENT, MASTER, EXP_AVG, EXP_AVG_SQ, COPY, LENGTH, FIRST_BLOCK, COLUMNS };

// What the host computes in double. adamw.py has the same fields in the same order.
struct Numbers {
  float decay;         // learning rate x weight decay
  float take_1;        // 1 - beta 1
  float keep_2;        // beta 2
  float take_2;        // 1 - beta 2
  float step_size;     // learning rate / (1 - beta 1 ^ step)
  float inverse_root;  // 1 / sqrt(1 - beta 2 ^ step)
  float eps;
};

struct Nothing {};  // no low-precision copy
struct Bf16 { unsigned short bits; };
struct Fp16 { unsigned short bits; };

// The conversions are integer arithmetic: a CPU and a GPU give the same bits, and no header is needed.

__device__ inline float widen(float x) { return x; }

__device__ inline float widen(Bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline float widen(Fp16 x) {
  const unsigned magnitude = (x.bits & 0x7fffu) << 13;
  // The exponent's bias is 112 less in fp16. The product is exact, also for numbers below fp16's normal ones.
  const unsigned scaled = __float_as_uint(__uint_as_float(magnitude) * __uint_as_float(0x77800000u));
  const unsigned special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinite, or not a number
  return __uint_as_float((x.bits & 0x8000u) << 16 | scaled | special);
}

// Round to the nearest, and to the even one of two. What is not a number stays one.
__device__ inline void narrow(float x, Bf16& to) {
  const unsigned bits = __float_as_uint(x);
  const bool is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
  to.bits = is_number ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : (bits >> 16 & 0x8000u) | 0x7fc0u;
}

__device__ inline void narrow(float x, Fp16& to) {
  const unsigned magnitude = __float_as_uint(x) & 0x7fffffffu;
  unsigned bits;
  if (magnitude > 0x7f800000u) bits = 0x7e00u;        // not a number
  else if (magnitude >= 0x477ff000u) bits = 0x7c00u;  // 65,520 and more become infinite
  else if (magnitude < 0x38800000u)  // below 2^-14 the step is 2^-24, which is the step of fp32 from 0.5 on
    bits = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  else bits = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  to.bits = (__float_as_uint(x) >> 16 & 0x8000u) | bits;
}

__device__ inline void narrow(float, Nothing&) {}

// Elements that a thread loads and stores with 16-byte instructions. They are not used again soon: the cache is told so.
template <class T, int width> struct alignas(16) Wide { T of[width]; };

template <class T, int width> __device__ inline Wide<T, width> load(const T* from) {
  Wide<T, width> wide;
#pragma unroll
  for (int i = 0; i < (int)sizeof(wide) / 16; i++) ((uint4*)wide.of)[i] = __ldcs((const uint4*)from + i);
  return wide;
}

template <class T, int width> __device__ inline void store(T* to, const Wide<T, width>& wide) {
#pragma unroll
  for (int i = 0; i < (int)sizeof(wide) / 16; i++) __stcs((uint4*)to + i, ((const uint4*)wide.of)[i]);
}

template <class T> constexpr bool stored = true;
template <> constexpr bool stored<Nothing> = false;

// Update one element in the order of torch's AdamW. Returns what was added to the master weight.
__device__ inline float update(float gradient, float& master, float& mean, float& square, const Numbers& n) {
  const float before = master;
  master -= n.decay * master;
  mean += n.take_1 * (gradient - mean);
  square = n.keep_2 * square + n.take_2 * gradient * gradient;
  master -= n.step_size * mean / (sqrtf(square) * n.inverse_root + n.eps);
  return master - before;
}

// The sum of x over the threads of a block, always in the same order. Thread 0 has it.
__device__ inline float block_sum(float x) {
  __shared__ float warps[32];
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_down_sync(0xffffffffu, x, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int i = 1; i < (int)(blockDim.x / 32); i++) x += warps[i];
  return x;
}

// The row of the tensor that a block belongs to: the last one that begins at this block or before it.
__device__ inline const long long* find_row(const long long* table, int tensors, long long block) {
  int low = 0, high = tensors - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table[middle * COLUMNS + FIRST_BLOCK] <= block) low = middle;
    else high = middle - 1;
  }
  return table + low * COLUMNS;
}

template <class Gradient, class Copy>
__device__ inline float update_chunk(const long long* row, long long first, int chunk, const Numbers& n, float factor) {
  const long long left = row[LENGTH] - first;
  const int count = left < chunk ? (int)left : chunk;
  const Gradient* gradients = (const Gradient*)row[GRADIENT] + first;
  float* masters = (float*)row[MASTER] + first;
  float* means = (float*)row[EXP_AVG] + first;
  float* squares = (float*)row[EXP_AVG_SQ] + first;
  Copy* copies = (Copy*)row[COPY] + first;

  constexpr int width = sizeof(Gradient) == 2 || stored<Copy> ? 8 : 4;  // 16 bytes of the smallest type
  const bool aligned = ((row[GRADIENT] | row[MASTER] | row[EXP_AVG] | row[EXP_AVG_SQ] | row[COPY]) & 15) == 0;
  const int vectors = aligned ? count / width * width : 0;  // elements in them; first is a multiple of the width
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x * width; i < vectors; i += blockDim.x * width) {
    const auto gradient = load<Gradient, width>(gradients + i);
    auto master = load<float, width>(masters + i);
    auto mean = load<float, width>(means + i);
    auto square = load<float, width>(squares + i);
    Wide<Copy, width> copy;
#pragma unroll
    for (int k = 0; k < width; k++) {
      const float added = update(widen(gradient.of[k]) * factor, master.of[k], mean.of[k], square.of[k], n);
      narrow(master.of[k], copy.of[k]);
      sum += added * added;
    }
    store(masters + i, master);
    store(means + i, mean);
    store(squares + i, square);
    if constexpr (stored<Copy>) store(copies + i, copy);
  }
#pragma unroll 1
  for (int i = vectors + threadIdx.x; i < count; i += blockDim.x) {
    const float added = update(widen(gradients[i]) * factor, masters[i], means[i], squares[i], n);
    if constexpr (stored<Copy>) narrow(masters[i], copies[i]);
    sum += added * added;
  }
  return sum;
}

// A factor that is not finite tells of an overflow: then nothing is written, but for sums of zero.
template <class Gradient, class Copy>
__device__ inline void adamw(const long long* table, int tensors, int chunk, const Numbers& n, const float* factor,
                             float* partial_sums) {
  const long long block = blockIdx.x;
  float sum = 0;
  if ((__float_as_uint(*factor) & 0x7f800000u) != 0x7f800000u) {
    const long long* row = find_row(table, tensors, block);
    sum = update_chunk<Gradient, Copy>(row, (block - row[FIRST_BLOCK]) * chunk, chunk, n, *factor);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial_sums[block] = sum;
}

#define KERNEL(name, Gradient, Copy)                                                                          \
  extern "C" __global__ void __launch_bounds__(256) name(const long long* table, int tensors, int chunk,      \
                                                         Numbers n, const float* factor, float* partial_sums) { \
    adamw<Gradient, Copy>(table, tensors, chunk, n, factor, partial_sums);                                    \
  }

KERNEL(adamw_fp32, float, Nothing)
KERNEL(adamw_fp32_bf16, float, Bf16)
KERNEL(adamw_fp32_fp16, float, Fp16)
KERNEL(adamw_bf16, Bf16, Nothing)
KERNEL(adamw_bf16_bf16, Bf16, Bf16)
KERNEL(adamw_fp16, Fp16, Nothing)
KERNEL(adamw_fp16_fp16, Fp16, Fp16)

// One block for each tensor: the sum of its partial sums, in a fixed order.
extern "C" __global__ void __launch_bounds__(256) adamw_squares(const long long* table, const float* partial_sums,
                                                                float* squares) {
  const long long* row = table + (long long)blockIdx.x * COLUMNS;
  const long long end = row[COLUMNS + FIRST_BLOCK];
  float sum = 0;
#pragma unroll 1
  for (long long i = row[FIRST_BLOCK] + threadIdx.x; i < end; i += blockDim.x) sum += partial_sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}
