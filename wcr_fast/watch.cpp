// What a repeated call finds out before it launches: is everything as it was, and where do the gradients lie now?
// The twin of watch.py, which needs some ten reads of Python for every tensor. Compiled by native.py.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

// Items and tensors of Python lists, borrowed.
PyObject* item(const py::list& list, size_t i) { return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)); }
const at::Tensor& tensor(const py::list& list, size_t i) { return THPVariable_Unpack(item(list, i)); }

// How a tensor lies in memory. No reference to it is kept.
struct Seen {
  explicit Seen(const at::Tensor& t)
      : data(t.data_ptr()), keys(t.key_set()), dtype(t.scalar_type()), device(t.device()),
        trained(t.requires_grad()), layout(t.sizes().begin(), t.sizes().end()) {
    layout.append(t.strides().begin(), t.strides().end());
  }

  bool looks_like(const at::Tensor& t) const {
    // A tensor of another kind (sparse, say) may have no strides to ask for: the keys come first.
    if (!(t.key_set() == keys) || t.scalar_type() != dtype || t.device() != device) return false;
    if (t.requires_grad() != trained) return false;
    const auto sizes = t.sizes(), strides = t.strides();
    return sizes.size() + strides.size() == layout.size() &&
           std::equal(sizes.begin(), sizes.end(), layout.begin()) &&
           std::equal(strides.begin(), strides.end(), layout.begin() + sizes.size());
  }

  bool lies_like(const at::Tensor& t) const { return looks_like(t) && t.data_ptr() == data; }

  const void* data;
  c10::DispatchKeySet keys;
  at::ScalarType dtype;
  at::Device device;
  bool trained;
  c10::SmallVector<int64_t, 8> layout;  // sizes, then strides: in place up to four dimensions
};

class Watch {
 public:
  // params: tensors with gradients. arrays: others that must stay in place. counted: the places of the params whose
  // versions are reported, in ascending order. grads_written: whose counters are raised, the gradients' or the params'.
  Watch(const py::list& params, const py::list& arrays, const std::vector<size_t>& counted, bool grads_written)
      : counted_(params.size(), false), grads_written_(grads_written) {
    for (size_t i : counted) counted_.at(i) = true;
    for (size_t i = 0; i < params.size(); ++i) {
      params_.push_back(see(params, i));
      const at::Tensor& grad = tensor(params, i).grad();
      if (!grad.defined()) throw py::value_error("a parameter without a gradient can't be watched");
      grads_.emplace_back(grad);
    }
    for (size_t i = 0; i < arrays.size(); ++i) arrays_.push_back(see(arrays, i));
  }

  // Return (gradients' addresses, versions) as arrays of int64 and raise the counters; None where anything else is not
  // as it was. now must hold the same objects as params, and dicts[i][keys[i]] be held[i]; params and arrays are the
  // constructor's.
  py::object look(const py::list& now, const py::list& params, const py::list& arrays, const py::list& dicts,
                  const py::list& keys, const py::list& held) const {
    if (params.size() != params_.size() || arrays.size() != arrays_.size() || dicts.size() != held.size() ||
        keys.size() != held.size()) {
      throw py::value_error("these are not the lists that the watch was made for");
    }
    if (now.size() != params.size()) return py::none();
    for (size_t i = 0; i < params_.size(); ++i) {
      if (item(now, i) != item(params, i)) return py::none();
    }
    for (size_t i = 0; i < held.size(); ++i) {
      PyObject* found = PyDict_GetItemWithError(item(dicts, i), item(keys, i));
      if (PyErr_Occurred()) throw py::error_already_set();
      if (found != item(held, i)) return py::none();
    }
    for (size_t i = 0; i < arrays_.size(); ++i) {
      if (!arrays_[i].lies_like(tensor(arrays, i))) return py::none();
    }
    std::vector<int64_t> addresses(params_.size()), versions;
    versions.reserve(params_.size());
    for (size_t i = 0; i < params_.size(); ++i) {
      const at::Tensor& param = tensor(params, i);
      if (!params_[i].lies_like(param)) return py::none();
      const at::Tensor& grad = param.grad();
      if (!grad.defined() || !grads_[i].looks_like(grad)) return py::none();
      addresses[i] = reinterpret_cast<int64_t>(grad.data_ptr());
      if (counted_[i]) versions.push_back(param._version());
    }
    for (size_t i = 0; i < params_.size(); ++i) {
      const at::Tensor& param = tensor(params, i);
      const at::Tensor& written = grads_written_ ? param.grad() : param;
      if (!written.is_inference()) torch::autograd::impl::bump_version(written);
    }
    return py::make_tuple(buffer(addresses), buffer(versions));
  }

 private:
  static Seen see(const py::list& list, size_t i) {
    if (!THPVariable_CheckExact(item(list, i))) throw py::type_error("only plain tensors can be watched");
    return Seen(tensor(list, i));
  }

  static py::bytearray buffer(const std::vector<int64_t>& numbers) {
    return py::bytearray(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
  }

  std::vector<Seen> params_, grads_, arrays_;
  std::vector<char> counted_;  // by param
  bool grads_written_;
};

}  // namespace

PYBIND11_MODULE(_watch, m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::list&, const py::list&, const std::vector<size_t>&, bool>())
      .def("look", &Watch::look);
}
