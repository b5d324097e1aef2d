// Checks of tensors on the host, before anything is launched.
//
//   Symbol T("T"), H("H");
//   Device device;
//   TensorMatcher({T, H, 128}).dtype<float, __nv_bfloat16>().strides({kAny, kAny, 1}).device(device).verify(k, "k");
//   TensorMatcher({T}).dtype<int32_t>().contiguous().device(device).verify(loc, "loc");
//
// A symbol takes its value from the first tensor that has it, and must have the same value in every later one. A failed check
// throws ValueError or TypeError naming the argument, what was wanted and what was found. Nothing is allocated when all is well.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace inductor_ext {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kMaxDims = 8;

// ---- dtypes -----------------------------------------------------------------------------------------------------------------

template <typename T>
struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DLDataType value{kDLFloat, 32, 1}; };
template <> struct DTypeOf<double> { static constexpr DLDataType value{kDLFloat, 64, 1}; };
template <> struct DTypeOf<__half> { static constexpr DLDataType value{kDLFloat, 16, 1}; };
template <> struct DTypeOf<__nv_bfloat16> { static constexpr DLDataType value{kDLBfloat, 16, 1}; };
template <> struct DTypeOf<__nv_fp8_e4m3> { static constexpr DLDataType value{kDLFloat8_e4m3fn, 8, 1}; };
template <> struct DTypeOf<__nv_fp8_e5m2> { static constexpr DLDataType value{kDLFloat8_e5m2, 8, 1}; };
template <> struct DTypeOf<__nv_fp8_e8m0> { static constexpr DLDataType value{kDLFloat8_e8m0fnu, 8, 1}; };
template <> struct DTypeOf<uint8_t> { static constexpr DLDataType value{kDLUInt, 8, 1}; };
template <> struct DTypeOf<int32_t> { static constexpr DLDataType value{kDLInt, 32, 1}; };
template <> struct DTypeOf<int64_t> { static constexpr DLDataType value{kDLInt, 64, 1}; };

inline bool same_dtype(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

inline std::string dtype_name(DLDataType t) {
  switch (t.code) {
    case kDLFloat: return "float" + std::to_string(t.bits);
    case kDLBfloat: return "bfloat16";
    case kDLInt: return "int" + std::to_string(t.bits);
    case kDLUInt: return "uint" + std::to_string(t.bits);
    case kDLBool: return "bool";
    case kDLFloat8_e4m3fn: return "float8_e4m3fn";
    case kDLFloat8_e5m2: return "float8_e5m2";
    case kDLFloat8_e8m0fnu: return "float8_e8m0fnu";
    case kDLFloat4_e2m1fn: return "float4_e2m1fn";
  }
  return "dtype code " + std::to_string(t.code) + ", " + std::to_string(t.bits) + " bits";
}

inline std::string list_of(const int64_t* values, int n) {
  std::string text = "[";
  for (int i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}
inline std::string shape_of(const TensorView& view) { return list_of(view.shape().data(), view.ndim()); }
inline std::string strides_of(const TensorView& view) { return list_of(view.strides().data(), view.ndim()); }

template <typename T = void>
T* data(const TensorView& view) {
  return reinterpret_cast<T*>(static_cast<char*>(view.data_ptr()) + view.byte_offset());
}

// ---- symbols and the matcher ------------------------------------------------------------------------------------------------

class Symbol {
 public:
  explicit constexpr Symbol(const char* name) : name_(name) {}
  const char* name() const { return name_; }
  int64_t value() const { return value_; }
  bool resolved() const { return from_ != nullptr; }
  const char* from() const { return from_; }  // the argument that gave the value
  void resolve(int64_t value, const char* from) { value_ = value, from_ = from; }

 private:
  const char* name_;
  const char* from_ = nullptr;
  int64_t value_ = 0;
};

class Device {
 public:
  int id() const { return id_; }
  const char* from() const { return from_; }
  void resolve(int id, const char* from) { id_ = id, from_ = from; }

 private:
  int id_ = -1;
  const char* from_ = nullptr;
};

constexpr int64_t kAny = INT64_MIN;  // a size or stride that may be anything

struct Dim {
  Dim() = default;
  Dim(int64_t value) : value(value) {}              // NOLINT(runtime/explicit)
  Dim(int value) : value(value) {}                  // NOLINT(runtime/explicit)
  Dim(Symbol& symbol) : symbol(&symbol), value(0) {}  // NOLINT(runtime/explicit)
  bool matches(int64_t found, const char* argument) const {
    if (symbol == nullptr) return value == kAny || value == found;
    if (!symbol->resolved()) symbol->resolve(found, argument);
    return symbol->value() == found;
  }
  std::string text() const {
    if (symbol == nullptr) return value == kAny ? "any" : std::to_string(value);
    std::string known = symbol->resolved() ? " = " + std::to_string(symbol->value()) + " (from " + symbol->from() + ")" : "";
    return symbol->name() + known;
  }

  Symbol* symbol = nullptr;
  int64_t value = kAny;
};

class TensorMatcher {
 public:
  TensorMatcher() = default;  // any shape
  TensorMatcher(std::initializer_list<Dim> shape) : ndim_(static_cast<int>(shape.size())) { copy(shape, shape_); }

  template <typename... T>
  TensorMatcher& dtype() {
    ((dtypes_[num_dtypes_++] = DTypeOf<T>::value), ...);
    return *this;
  }
  TensorMatcher& strides(std::initializer_list<Dim> strides) {
    has_strides_ = true;
    copy(strides, strides_);
    return *this;
  }
  TensorMatcher& contiguous() {
    contiguous_ = true;
    return *this;
  }
  TensorMatcher& device(Device& device) {
    device_ = &device;
    return *this;
  }

  void verify(const TensorView& view, const char* name) const {
    if (num_dtypes_ > 0) verify_dtype(view, name);
    if (device_ != nullptr) verify_device(view, name);
    if (ndim_ >= 0 && view.ndim() != ndim_) {
      TVM_FFI_THROW(ValueError) << name << ": wanted shape " << wanted(shape_) << ", found " << shape_of(view);
    }
    const int64_t* sizes = view.shape().data();
    for (int i = 0; i < ndim_; ++i) {
      if (!shape_[i].matches(sizes[i], name)) {
        TVM_FFI_THROW(ValueError) << name << ": wanted shape " << wanted(shape_) << ", found " << shape_of(view);
      }
    }
    if (has_strides_ && view.numel() > 0) {
      for (int i = 0; i < ndim_; ++i) {
        if (sizes[i] != 1 && !strides_[i].matches(view.strides()[i], name)) {
          TVM_FFI_THROW(ValueError) << name << ": wanted strides " << wanted(strides_) << ", found " << strides_of(view)
                                    << " of shape " << shape_of(view);
        }
      }
    }
    if (contiguous_ && !view.IsContiguous()) {
      TVM_FFI_THROW(ValueError) << name << ": wanted a contiguous tensor, found strides " << strides_of(view) << " of shape "
                                << shape_of(view);
    }
  }

 private:
  void verify_dtype(const TensorView& view, const char* name) const {
    std::string names;
    for (int i = 0; i < num_dtypes_; ++i) {
      if (same_dtype(view.dtype(), dtypes_[i])) return;
    }
    for (int i = 0; i < num_dtypes_; ++i) names += (i ? " or " : "") + dtype_name(dtypes_[i]);
    TVM_FFI_THROW(TypeError) << name << ": wanted " << names << ", found " << dtype_name(view.dtype());
  }
  void verify_device(const TensorView& view, const char* name) const {
    DLDevice found = view.device();
    if (found.device_type != kDLCUDA) {
      TVM_FFI_THROW(ValueError) << name << ": wanted a CUDA tensor, found one of device type " << int(found.device_type);
    }
    if (device_->from() == nullptr) device_->resolve(found.device_id, name);
    if (device_->id() != found.device_id) {
      TVM_FFI_THROW(ValueError) << name << ": wanted cuda:" << device_->id() << " as " << device_->from() << ", found cuda:"
                                << found.device_id;
    }
  }
  std::string wanted(const Dim* dims) const {
    std::string text = "[";
    for (int i = 0; i < ndim_; ++i) text += (i ? ", " : "") + dims[i].text();
    return text + "]";
  }

  static void copy(std::initializer_list<Dim> from, Dim* to) {
    for (const Dim& dim : from) *to++ = dim;  // at most kMaxDims
  }

  Dim shape_[kMaxDims];
  Dim strides_[kMaxDims];
  int ndim_ = -1;
  bool has_strides_ = false;
  bool contiguous_ = false;
  Device* device_ = nullptr;
  int num_dtypes_ = 0;
  DLDataType dtypes_[6] = {};
};

// ---- tensors as rows --------------------------------------------------------------------------------------------------------

// The stride of one row when dims [0, dims) of the view are seen as one dimension; false if they are not one.
inline bool collapse_leading(const TensorView& view, int dims, int64_t* rows, int64_t* pitch) {
  *rows = 1, *pitch = 0;
  for (int i = dims - 1; i >= 0; --i) {
    int64_t size = view.shape()[i], stride = view.strides()[i];
    if (size == 1) continue;
    if (*rows == 1) {
      *pitch = stride;
    } else if (stride != *pitch * *rows) {
      return false;
    }
    *rows *= size;
  }
  return true;
}

struct Rows {
  int64_t rows, cols, pitch;  // element (r, c) is at r * pitch + c
};

// The view as rows of its last dimension: unit stride within a row, one stride between rows.
inline Rows rows_of(const TensorView& view, const char* name) {
  if (view.ndim() == 0) TVM_FFI_THROW(ValueError) << name << ": wanted at least one dimension, found a 0-d tensor";
  int last = view.ndim() - 1;
  Rows result{1, view.shape()[last], 0};
  if (view.numel() == 0) {
    for (int i = 0; i < last; ++i) result.rows *= view.shape()[i];
    return result;
  }
  bool unit = result.cols == 1 || view.strides()[last] == 1;
  if (!unit || !collapse_leading(view, last, &result.rows, &result.pitch)) {
    TVM_FFI_THROW(ValueError) << name << ": wanted rows with unit stride and one stride between them, found strides "
                              << strides_of(view) << " of shape " << shape_of(view);
  }
  if (result.rows == 1) result.pitch = result.cols;
  return result;
}

// Two tensors of one shape as the fewest rows that both have, dimensions being reordered and merged alike in both: one row
// where both are dense with the same strides (any permutation). For element-wise work, where the order of rows is free.
struct PairRows {
  int64_t rows, cols, a_pitch, b_pitch;
};

inline PairRows pair_rows(const TensorView& a, const char* a_name, const TensorView& b, const char* b_name) {
  if (a.ndim() != b.ndim() || a.ndim() > kMaxDims) {
    TVM_FFI_THROW(ValueError) << b_name << ": wanted the shape of " << a_name << ", " << shape_of(a) << " (at most " << kMaxDims
                              << " dimensions), found " << shape_of(b);
  }
  struct Merged {
    int64_t size, a_stride, b_stride;
  } dims[kMaxDims];
  int n = 0;
  for (int i = 0; i < a.ndim(); ++i) {
    int64_t size = a.shape()[i];
    if (size != b.shape()[i]) {
      TVM_FFI_THROW(ValueError) << b_name << ": wanted the shape of " << a_name << ", " << shape_of(a) << ", found " << shape_of(b);
    }
    if (size == 0) return {0, 0, 0, 0};
    if (size == 1) continue;
    Merged dim{size, a.strides()[i], b.strides()[i]};
    int at = n++;
    for (; at > 0 && dims[at - 1].b_stride < dim.b_stride; --at) dims[at] = dims[at - 1];
    dims[at] = dim;
  }
  int merged = 0;  // dims[0, merged) are final but for the last, from outer to inner
  for (int i = 1; i < n; ++i) {
    Merged& outer = dims[merged];
    if (outer.a_stride == dims[i].size * dims[i].a_stride && outer.b_stride == dims[i].size * dims[i].b_stride) {
      dims[merged] = {outer.size * dims[i].size, dims[i].a_stride, dims[i].b_stride};
    } else {
      dims[++merged] = dims[i];
    }
  }
  if (n == 0) return {1, 1, 1, 1};
  const Merged& inner = dims[merged];
  if (inner.a_stride == 1 && inner.b_stride == 1) {
    if (merged == 0) return {1, inner.size, inner.size, inner.size};
    if (merged == 1) return {dims[0].size, inner.size, dims[0].a_stride, dims[0].b_stride};
  } else if (merged == 0) {
    return {inner.size, 1, inner.a_stride, inner.b_stride};  // one column of a matrix
  }
  TVM_FFI_THROW(ValueError) << a_name << " and " << b_name << ": wanted rows with unit stride and one stride between them, found "
                            << "strides " << strides_of(a) << " and " << strides_of(b) << " of shape " << shape_of(a);
  return {};
}

// Kernels count the elements of a row in 32 bits, with room for the last step of a loop.
inline void check_row_length(int64_t cols, const char* name) {
  if (cols > (int64_t{1} << 30)) TVM_FFI_THROW(ValueError) << name << ": wanted rows of at most 2^30 elements, found " << cols;
}

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace inductor_ext
