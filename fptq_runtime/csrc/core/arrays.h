// Python's dataclasses of numpy arrays, read by name into plain views. kernels/base.py describes the dataclasses; a
// table here says where each array goes, and kernels/cpu.py compares the two when it is imported.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fptq {

// An array's element: numpy's name and the buffer protocol's format.
struct ElementType {
  std::string name, format;
};

template <class T>
ElementType element_type();
template <>
inline ElementType element_type<int32_t>() {
  return {"int32", "i"};
}
template <>
inline ElementType element_type<uint32_t>() {
  return {"uint32", "I"};
}
template <>
inline ElementType element_type<int64_t>() {
  return {"int64", "l"};
}
template <>
inline ElementType element_type<uint64_t>() {
  return {"uint64", "L"};
}
template <>
inline ElementType element_type<float>() {
  return {"float32", "f"};
}
template <>
inline ElementType element_type<double>() {
  return {"float64", "d"};
}

// A dimension of a view's arrays: a size that the first array of that dimension sets, and how many more.
template <class View>
struct Dim {
  const char* name;
  int View::* size;
  int more = 0;
  Dim operator+(int count) const { return {name, size, more + count}; }
  std::string text() const { return more ? std::string(name) + " + " + std::to_string(more) : name; }
};

// One array: its name in the dataclass and its member in the view; written to where that is not const.
template <class View>
class Field {
 public:
  template <class T>
  Field(const char* name, T* View::* data, std::vector<Dim<View>> shape)
      : name_(name),
        element_(element_type<std::remove_const_t<T>>()),
        writable_(!std::is_const_v<T>),
        set_([data](View& view, void* memory) { view.*data = static_cast<T*>(memory); }),
        shape_(std::move(shape)) {}

  // (name, element, shape), as kernels/base.py's `arrays_of` gives it.
  std::tuple<std::string, std::string, std::string> describe() const { return {name_, element_.name, text()}; }

  // Throws std::invalid_argument where the object is no such array. `buffer` holds the array until it is released.
  void read(PyObject* array, Py_buffer& buffer, View& view) const {
    if (PyObject_GetBuffer(array, &buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable_ ? PyBUF_WRITABLE : 0))) {
      PyErr_Clear();
      buffer.obj = nullptr;
      refuse();
    }
    if (element_.format != buffer.format || buffer.ndim != static_cast<int>(shape_.size())) refuse();
    for (int i = 0; i < buffer.ndim; ++i) {
      const Dim<View>& dim = shape_[i];
      int& size = view.*dim.size;
      const Py_ssize_t given = buffer.shape[i] - dim.more;
      if (given < 0 || given > INT32_MAX || (size >= 0 && size != given)) refuse(&view);
      size = static_cast<int>(given);
    }
    set_(view, buffer.buf);
  }

  const char* name() const { return name_; }

 private:
  std::string text() const {
    std::string text;
    for (const Dim<View>& dim : shape_) text += (text.empty() ? "" : ", ") + dim.text();
    return text;
  }

  [[noreturn]] void refuse(const View* view = nullptr) const {
    std::string sizes;
    for (const Dim<View>& dim : shape_)
      if (view && view->*dim.size >= 0)
        sizes += (sizes.empty() ? ", " : " and ") + std::string(dim.name) + " = " + std::to_string(view->*dim.size);
    throw std::invalid_argument(std::string(name_) + " must be a contiguous" + (writable_ ? " writable " : " ") +
                                element_.name + " array of shape [" + text() + "]" + sizes);
  }

  const char* name_;
  ElementType element_;
  bool writable_;
  std::function<void(View&, void*)> set_;
  std::vector<Dim<View>> shape_;
};

// Arrays that are held while C++ works on them. Needs the GIL at both ends.
class HeldArrays {
 public:
  HeldArrays() = default;
  HeldArrays(const HeldArrays&) = delete;
  HeldArrays& operator=(const HeldArrays&) = delete;
  ~HeldArrays() {
    for (int i = 0; i < count_; ++i) PyBuffer_Release(&buffers_[i]);
  }

  template <class View>
  void read(const Field<View>& field, nanobind::handle array, View& view) {
    field.read(array.ptr(), buffers_.at(count_++), view);
  }
  template <class View>
  void read(const std::vector<Field<View>>& fields, nanobind::handle dataclass, View& view) {
    for (const Field<View>& field : fields) read(field, dataclass.attr(field.name()), view);
  }

 private:
  std::array<Py_buffer, 20> buffers_{};  // one that could not be had holds nothing
  int count_ = 0;
};

}  // namespace fptq
