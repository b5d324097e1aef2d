// Stand-in for tensors and their checks, which need tvm-ffi: shapes and strides, and nothing is verified.
#pragma once

#include <optional>
#include <sstream>

#include "vec.cuh"

#define TVM_FFI_THROW(kind) cuda_on_cpu::Thrower{} << #kind ": "

namespace cuda_on_cpu {
struct Thrower {
  std::ostringstream text;
  template <typename T>
  Thrower& operator<<(const T& value) {
    text << value;
    return *this;
  }
  ~Thrower() noexcept(false) { throw std::runtime_error(text.str()); }
};
}  // namespace cuda_on_cpu

namespace inductor_ext {

template <typename T>
using Optional = std::optional<T>;

struct TensorView {
  void* pointer;
  std::vector<int64_t> sizes, steps;
  int ndim() const { return static_cast<int>(sizes.size()); }
  const std::vector<int64_t>& shape() const { return sizes; }
  const std::vector<int64_t>& strides() const { return steps; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    return count;
  }
};
template <typename T = void>
T* data(const TensorView& view) { return static_cast<T*>(view.pointer); }
inline std::string shape_of(const TensorView&) { return "…"; }
inline std::string strides_of(const TensorView&) { return "…"; }

struct Device {
  int id() const { return 0; }
};
struct Symbol {
  explicit Symbol(const char*) {}
  int64_t value() const { return size; }
  int64_t size = 0;
};
struct Dim {
  explicit Dim(Symbol& symbol) : symbol(symbol) {}
  bool matches(int64_t found, const char*) { return symbol.size = found, true; }
  std::string text() const { return "…"; }
  Symbol& symbol;
};
constexpr int kAny = 0;
struct Step {  // the stride of a dimension
  Step(int) {}
  Step(Symbol& symbol) : symbol(&symbol) {}
  Symbol* symbol = nullptr;
};
struct TensorMatcher {
  TensorMatcher() = default;
  TensorMatcher(std::initializer_list<int64_t>) {}
  TensorMatcher(std::initializer_list<std::reference_wrapper<Symbol>> shape) : symbols(shape) {}
  template <typename... T> TensorMatcher& dtype() { return *this; }
  TensorMatcher& contiguous() { return *this; }
  TensorMatcher& strides(std::initializer_list<Step> given) {
    steps = given;
    return *this;
  }
  TensorMatcher& device(Device&) { return *this; }
  void verify(const TensorView& view, const char*) {
    for (size_t i = 0; i < symbols.size(); ++i) symbols[i].get().size = view.sizes[i];
    for (size_t i = 0; i < steps.size(); ++i) {
      if (steps[i].symbol != nullptr) steps[i].symbol->size = view.steps[i];
    }
  }
  std::vector<std::reference_wrapper<Symbol>> symbols;
  std::vector<Step> steps;
};
struct Rows {
  int64_t rows, cols, pitch;
};
inline Rows rows_of(const TensorView& view, const char*) {  // of one or two dimensions
  const int64_t cols = view.sizes.back();
  return {view.numel() / cols, cols, view.ndim() == 2 ? view.steps[0] : cols};
}
struct PairRows {
  int64_t rows, cols, a_pitch, b_pitch;
};
inline PairRows pair_rows(const TensorView& a, const char*, const TensorView&, const char*) {  // contiguous ones
  return {a.numel() > 0, a.numel(), 0, 0};
}
inline void check_row_length(int64_t, const char*) {}
inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace inductor_ext
