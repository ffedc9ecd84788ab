// The program that ThreadSanitizer watches: thread_shim.h and adamw.cu stand before it (test_adamw.py). One block after
// another, each of two warps; the second tensor has several blocks.
#include <cstdio>

LAUNCHER(adamw_fp32_bf16)
LAUNCHER(adamw_squares)

int main() {
  constexpr int tensors = 3, chunk = 64, threads = 64;
  const long long sizes[tensors] = {5, 200, 64};
  std::vector<float> floats[tensors][4];
  std::vector<unsigned short> copies[tensors];
  std::vector<long long> table;
  long long blocks = 0;
  for (int i = 0; i < tensors; i++) {
    for (auto& one : floats[i]) {
      one.assign(sizes[i], 0.5f);
      table.push_back((long long)one.data());
    }
    copies[i].assign(sizes[i], 0);
    table.insert(table.end(), {(long long)copies[i].data(), sizes[i], blocks});
    blocks += (sizes[i] + chunk - 1) / chunk;
  }
  table.insert(table.end(), {0, 0, 0, 0, 0, 0, blocks});
  std::vector<float> partial_sums(blocks), squares(tensors);
  std::vector<unsigned> order;
  for (unsigned block = 0; block < blocks; block++) order.push_back(block);

  const long long* rows = table.data();
  int number_of_tensors = tensors, elements = chunk;
  Numbers numbers{1e-5f, 0.1f, 0.95f, 0.05f, 1e-3f, 1.0f, 1e-8f};
  float factor = 0.5f, *factors = &factor, *sums = partial_sums.data(), *results = squares.data();
  void* arguments[] = {&rows, &number_of_tensors, &elements, &numbers, &factors, &sums};
  launch_adamw_fp32_bf16(blocks, threads, arguments, order.data(), blocks);
  void* of_sums[] = {&rows, &sums, &results};
  launch_adamw_squares(tensors, threads, of_sums, order.data(), tensors);
  std::printf("update of %d tensors: %g %g %g\n", tensors, squares[0], squares[1], squares[2]);
}
