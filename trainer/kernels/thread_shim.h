// Runs CUDA C++ on a CPU: one std::thread for each thread of a block, one block after another. It is for proofs (values,
// races under -fsanitize=thread, addresses), not for speed. It has what adamw.cu needs: x dimensions, shared arrays,
// __syncthreads, __shfl_down_sync of whole warps. It has no asynchronous copies and no tensor cores.
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct Index { unsigned x; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

struct Warp {
  std::barrier<> together{32};
  unsigned exchanged[2][32];  // used in turn: nobody overwrites what a slower thread still has to read
};

inline Index blockDim, gridDim;  // of the launch that runs; launches do not overlap
inline std::optional<std::barrier<>> whole_block;  // those threads that have not ended
inline thread_local Index threadIdx, blockIdx;
inline thread_local Warp* warp;
inline thread_local unsigned turn;
inline thread_local unsigned barriers;  // that this thread has met in this block

template <class To, class From> To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }

// A GPU ends the program where an address is no multiple of the access. Here the launch says so.
inline std::atomic<bool> misaligned;

template <class T> T __ldcs(const T* from) {
  if ((unsigned long long)from % sizeof(T)) misaligned = true;
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T> void __stcs(T* to, T value) {
  if ((unsigned long long)to % sizeof(T)) misaligned = true;
  std::memcpy(to, &value, sizeof value);
}

inline void __syncthreads() {
  barriers++;
  whole_block->arrive_and_wait();
}

inline float __shfl_down_sync(unsigned, float value, unsigned distance) {
  unsigned (&lanes)[32] = warp->exchanged[turn ^= 1];
  const unsigned lane = threadIdx.x % 32;
  lanes[lane] = same_bits<unsigned>(value);
  warp->together.arrive_and_wait();
  return lane + distance < 32 ? same_bits<float>(lanes[lane + distance]) : value;
}

// Run the given blocks of a grid, in the given order, with the arguments as cuLaunchKernel takes them. Returns 1 if a
// vector was not aligned, 2 if a barrier was not met by all threads of a block (on a GPU it may wait for ever), or 0.
template <class... Types, std::size_t... I>
int launch(void (*kernel)(Types...), std::index_sequence<I...>, unsigned grid, unsigned threads, void** arguments,
           const unsigned* blocks, long long count) {
  misaligned = false;
  blockDim.x = threads;
  gridDim.x = grid;
  bool diverged = false;
  std::vector<unsigned> met(threads);
  std::barrier end_of_block(threads, [&]() noexcept {
    for (unsigned count : met) diverged |= count != met[0];
    whole_block.emplace(threads);
  });
  whole_block.emplace(threads);
  const auto warps = std::make_unique<Warp[]>(threads / 32);
  std::vector<std::thread> running;
  for (unsigned thread = 0; thread < threads; thread++)
    running.emplace_back([=, &warps, &met, &end_of_block] {
      threadIdx.x = thread;
      warp = &warps[thread / 32];
      for (long long i = 0; i < count; i++) {
        blockIdx.x = blocks[i];
        barriers = 0;
        kernel(*static_cast<std::remove_reference_t<Types>*>(arguments[I])...);
        met[thread] = barriers;
        whole_block->arrive_and_drop();
        end_of_block.arrive_and_wait();  // shared memory is free for the next block
      }
    });
  for (auto& one : running) one.join();
  return misaligned ? 1 : diverged ? 2 : 0;
}

#define LAUNCHER(name)                                                                                              \
  extern "C" int launch_##name(unsigned grid, unsigned threads, void** arguments, const unsigned* blocks,           \
                               long long count) {                                                                   \
    return [&]<class... Types>(void (*kernel)(Types...)) {                                                          \
      return launch(kernel, std::index_sequence_for<Types...>{}, grid, threads, arguments, blocks, count);          \
    }(name);                                                                                                        \
  }
