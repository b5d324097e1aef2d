// Stand-in for tensors and their checks, which need tvm-ffi: shapes and strides, and nothing is verified.
#pragma once

#include <optional>

#include "hopper_on_cpu.h"

#define TVM_FFI_THROW(kind) hopper_on_cpu::Thrower{} << #kind ": "

namespace hopper_on_cpu {
struct Thrower {
  std::ostringstream text;
  template <typename T>
  Thrower& operator<<(const T& value) {
    text << value;
    return *this;
  }
  ~Thrower() noexcept(false) { fail(text.str()); }
};
}  // namespace hopper_on_cpu

namespace inductor_ext {

template <typename T>
using Optional = std::optional<T>;
constexpr int64_t kAny = INT64_MIN;

struct TensorView {
  void* pointer;
  std::vector<int64_t> sizes, steps;
  const std::vector<int64_t>& shape() const { return sizes; }
  const std::vector<int64_t>& strides() const { return steps; }
  int ndim() const { return static_cast<int>(sizes.size()); }
  int64_t numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>()); }
};
template <typename T = void>
T* data(const TensorView& view) { return static_cast<T*>(view.pointer); }
inline std::string shape_of(const TensorView&) { return "…"; }
inline std::string strides_of(const TensorView&) { return "…"; }
inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }
template <typename T> struct DTypeOf { static constexpr int value = sizeof(T); };
inline std::string dtype_name(int size) { return std::to_string(size) + " bytes"; }

struct Device {
  int id() const { return 0; }
};
struct Symbol {
  explicit Symbol(const char*) {}
  int64_t value() const { return size; }
  int64_t size = 0;
};
struct Dim {
  Dim(Symbol& symbol) : symbol(&symbol) {}
  Dim(int64_t) {}
  Symbol* symbol = nullptr;
};
struct TensorMatcher {
  TensorMatcher() = default;
  TensorMatcher(std::initializer_list<Dim> shape) : dims(shape) {}
  template <typename... T> TensorMatcher& dtype() { return *this; }
  TensorMatcher& contiguous() { return *this; }
  TensorMatcher& strides(std::initializer_list<Dim>) { return *this; }
  TensorMatcher& device(Device&) { return *this; }
  void verify(const TensorView& view, const char* name) {
    for (size_t i = 0; i < dims.size(); ++i) {
      if (dims[i].symbol == nullptr) continue;
      if (dims[i].symbol->size != 0 && dims[i].symbol->size != view.sizes[i]) hopper_on_cpu::fail(std::string("shape of ") + name);
      dims[i].symbol->size = view.sizes[i];
    }
  }
  std::vector<Dim> dims;
};

}  // namespace inductor_ext
