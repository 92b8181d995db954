// The kernels one by one, on arrays, for any ISA this machine runs: what tests and `fptq bench` measure.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "core/float_matrix.h"
#include "core/pack.h"
#include "core/thread_pool.h"

namespace nb = nanobind;

namespace fptq {
namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using NumpyMatrix = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

constexpr const char* kCannotBe = "a weight of that size, group size or bits cannot be";

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class T>
NumpyMatrix<T> to_numpy(std::vector<T> values, size_t rows, size_t columns) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return NumpyMatrix<T>(owned->data(), {rows, columns}, owner);
}

// Activations and the memory behind them.
class QuantizedRows {
 public:
  QuantizedRows(const Matrix<const float>& x, std::optional<float> scale, const std::string& isa)
      : kernels_(kernels_for(isa)),
        rows_(checked(x).shape(0)),
        k_(static_cast<int>(x.shape(1))),
        codes_(layout().codes_size(rows_, k_)),
        scales_(rows_),
        sums_(layout().sums_size(rows_, k_)) {
    require(!scale || (*scale > 0 && std::isfinite(*scale)), "the static scale must be positive and finite");
    Activations view = activations();
    nb::gil_scoped_release release;
    for (size_t m = 0; m < rows_; ++m)
      kernels_.quantize_row(x.data() + m * k_, static_cast<int>(m), scale.value_or(0.0f), view);
  }

  Activations activations() { return {codes_.data(), scales_.data(), sums_.data(), static_cast<int>(rows_), k_}; }
  const Layout& layout() const { return *kernels_.layout; }
  size_t rows() const { return rows_; }
  int k() const { return k_; }

  NumpyMatrix<int8_t> codes() { return to_numpy(plain().first, rows_, padded_k()); }
  NumpyMatrix<float> scales() const { return to_numpy(scales_, rows_, 1); }
  NumpyMatrix<int32_t> sums() { return to_numpy(plain().second, rows_, padded_k() / layout().k_unit); }

 private:
  static const Matrix<const float>& checked(const Matrix<const float>& x) {
    const auto fits = [](size_t size) { return size > 0 && size <= 1 << 24; };
    require(fits(x.shape(0)) && fits(x.shape(1)), "x must have 1 to 2^24 rows and columns");
    return x;
  }

  size_t padded_k() const { return round_up(k_, layout().k_unit); }

  std::pair<std::vector<int8_t>, std::vector<int32_t>> plain() {
    const size_t width = padded_k(), blocks = width / layout().k_unit;
    std::vector<int8_t> codes(rows_ * width);
    std::vector<int32_t> sums(rows_ * blocks);
    for (size_t m = 0; m < rows_; ++m)
      layout().read_row(activations(), static_cast<int>(m), &codes[m * width], &sums[m * blocks]);
    return {std::move(codes), std::move(sums)};
  }

  const Kernels& kernels_;
  size_t rows_;
  int k_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
};

struct Span {
  int begin, end;
};

Span span(std::optional<std::pair<int, int>> given, int count, const char* message) {
  if (!given) return {0, count};
  require(0 <= given->first && given->first <= given->second && given->second <= count, message);
  return {given->first, given->second};
}

using OptionalVector = std::optional<Vector<const float>>;
using OptionalMatrix = std::optional<Matrix<const float>>;
using OptionalSpan = std::optional<std::pair<int, int>>;

Epilogue epilogue(const Matrix<float>& out, const OptionalVector& bias, const OptionalMatrix& residual, size_t m,
                  int n) {
  const size_t columns = n;
  require(out.shape(0) == m && out.shape(1) == columns, "out must be [M, N]");
  require(!bias || bias->shape(0) == columns, "bias must be [N]");
  require(!residual || (residual->shape(0) == m && residual->shape(1) == columns), "residual must be [M, N]");
  return {bias ? bias->data() : nullptr, residual ? residual->data() : nullptr, out.data(), n};
}

// Throws where the weight was packed for another ISA's layout.
template <class Weight>
int panels(const Weight& weight, const Kernels& kernels) {
  require(weight.layout == kernels.layout, "the weight is packed for another ISA path");
  return ceil_div(weight.n, kernels.layout->panel_cols);
}

void gemm(const PackedWeight& weight, QuantizedRows& x, const Matrix<float>& out, const OptionalVector& bias,
          const OptionalMatrix& residual, OptionalSpan rows, OptionalSpan columns, const std::string& isa) {
  require(round_up(x.k(), x.layout().k_unit) == round_up(weight.k, weight.layout->k_unit),
          "x and the weight differ in K");
  const Kernels& kernels = kernels_for(isa);
  require(&x.layout() == kernels.layout, "x is laid out for another ISA path");
  const Epilogue e = epilogue(out, bias, residual, x.rows(), weight.n);
  const Span m = span(rows, static_cast<int>(x.rows()), "rows out of range");
  const Span p = span(columns, panels(weight, kernels), "panels out of range");
  Activations view = x.activations();
  view.k = weight.k;
  nb::gil_scoped_release release;
  (weight.bits == 4 ? kernels.gemm_int4 : kernels.gemm_int8)(view, weight, e, m.begin, m.end, p.begin, p.end);
}

template <auto kGemm, class Weight>
void gemm_float(const Weight& weight, const Matrix<const float>& x, const Matrix<float>& out,
                const OptionalVector& bias, const OptionalMatrix& residual, OptionalSpan rows, OptionalSpan columns,
                const std::string& isa) {
  require(x.shape(1) == static_cast<size_t>(weight.k), "x and the weight differ in K");
  const Kernels& kernels = kernels_for(isa);
  const Epilogue e = epilogue(out, bias, residual, x.shape(0), weight.n);
  const Span m = span(rows, static_cast<int>(x.shape(0)), "rows out of range");
  const Span p = span(columns, panels(weight, kernels), "panels out of range");
  nb::gil_scoped_release release;
  (kernels.*kGemm)(x.data(), weight, e, m.begin, m.end, p.begin, p.end);
}

// Seconds of the fastest of `passes` runs of f on every thread of the pool at once.
template <class F>
double fastest(ThreadPool& pool, int passes, const F& f) {
  double best = 1e9;
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(pool.threads(), [&](int task, int) { f(task); });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

double peak_gops(ThreadPool& pool, const std::string& isa) {
  constexpr int kPasses = 20;
  const MultiplyFn multiply = kernels_for(isa).multiply;
  std::lock_guard<std::mutex> lock(pool.mutex());
  int64_t rounds = 1000;
  while (fastest(pool, 1, [&](int) { multiply(rounds); }) < 5e-3) rounds *= 2;
  return 2e-9 * static_cast<double>(multiply(rounds)) * pool.threads() /
         fastest(pool, kPasses, [&](int) { multiply(rounds); });
}

double read_bandwidth(ThreadPool& pool, int megabytes) {
  require(megabytes > 0 && megabytes <= 4096, "megabytes must be within 1..4096");
  constexpr int kPasses = 10;
  constexpr size_t kLine = 64, kAhead = 4096;
  using Vector = int64_t __attribute__((vector_size(16)));
  const size_t lines = (static_cast<size_t>(megabytes) << 20) / kLine - 1001;  // no two shares begin at equal low bits
  const size_t threads = pool.threads();
  const std::unique_ptr<char, void (*)(void*)> buffer(static_cast<char*>(allocate_lines(lines * kLine)), std::free);
  const auto share = [&](size_t task) { return buffer.get() + lines * task / threads * kLine; };
  std::lock_guard<std::mutex> lock(pool.mutex());
  pool.run(pool.threads(), [&](int task, int) { std::memset(share(task), 1, share(task + 1) - share(task)); });
  return 1e-9 * static_cast<double>(lines * kLine) / fastest(pool, kPasses, [&](int task) {
           Vector a{}, b{}, c{}, d{};
           for (const char *p = share(task), *end = share(task + 1); p < end; p += kLine) {
             __builtin_prefetch(p + kAhead);
             const Vector* line = reinterpret_cast<const Vector*>(p);
             a |= line[0];
             b |= line[1];
             c |= line[2];
             d |= line[3];
           }
           a |= b | c | d;
           asm volatile("" : : "m"(a));
         });
}

}  // namespace

void bind_gemm(nb::module_& m) {
  nb::class_<PackedWeight>(m, "PackedWeight", "int4 or int8 weight codes and scales in the kernels' layout.")
      .def_ro("n", &PackedWeight::n)
      .def_ro("k", &PackedWeight::k)
      .def_ro("bits", &PackedWeight::bits)
      .def_ro("bf16_scales", &PackedWeight::bf16_scales);
  nb::class_<FloatWeight>(m, "FloatWeight", "Float weights in the kernels' layout.")
      .def_ro("n", &FloatWeight::n)
      .def_ro("k", &FloatWeight::k);

  m.def(
      "pack_weight",
      [](const Matrix<const int8_t>& codes, const Matrix<const float>& scale, int group_size, int bits,
         const std::string& isa) {
        const size_t n = codes.shape(0), k = codes.shape(1);
        require(n <= INT32_MAX && k <= INT32_MAX && group_size > 0, kCannotBe);
        const size_t groups = (k + group_size - 1) / group_size;
        require(scale.shape(0) == n && scale.shape(1) == groups, "scale must be [N, ceil(K / group_size)]");
        const Layout& layout = *kernels_for(isa).layout;
        nb::gil_scoped_release release;
        return pack_weight(codes.data(), scale.data(), static_cast<int>(n), static_cast<int>(k), group_size, bits,
                           layout);
      },
      nb::arg("codes"), nb::arg("scale"), nb::arg("group_size"), nb::arg("bits"), nb::arg("isa") = "",
      "codes int8 [N, K] within ±2^(bits-1), scale float32 [N, ceil(K / group_size)]; group_size a multiple of 32,\n"
      "or K for one scale per channel. Raises ValueError.");

  m.def("peak_gops", &peak_gops, nb::arg("pool"), nb::arg("isa") = "", nb::call_guard<nb::gil_scoped_release>(),
        "Integer GOPS (a multiply-add is two) of the ISA's multiply instruction on registers, all threads of the pool\n"
        "together: the GEMMs' roof.");
  m.def("read_bandwidth", &read_bandwidth, nb::arg("pool"), nb::arg("megabytes") = 512,
        nb::call_guard<nb::gil_scoped_release>(),
        "GB/s at which the pool's threads together read a buffer once, the fastest of ten passes. Take one that no\n"
        "cache holds. Raises ValueError.");

  m.def(
      "pack_weight",
      [](const Matrix<const int32_t>& packed, const Matrix<const float>& scale, int group_size, int bits,
         ThreadPool* pool, const std::string& isa) {
        require(group_size > 0 && scale.shape(1) <= INT32_MAX && (bits == 4 || bits == 8), kCannotBe);
        const size_t n = packed.shape(0), k = scale.shape(1) * group_size;
        require(n <= INT32_MAX && k <= INT32_MAX, kCannotBe);
        require(scale.shape(0) == n && packed.shape(1) == (k * bits + 31) / 32,
                "packed must be [N, ceil(K * bits / 32)] and scale [N, K / group_size]");
        const Layout& layout = *kernels_for(isa).layout;
        nb::gil_scoped_release release;
        return pack_weight(packed.data(), scale.data(), static_cast<int>(n), static_cast<int>(k), group_size, bits,
                           layout, pool);
      },
      nb::arg("codes"), nb::arg("scale"), nb::arg("group_size"), nb::arg("bits"), nb::arg("pool") = nb::none(),
      nb::arg("isa") = "", "The same from a checkpoint's int32 words [N, ceil(K · bits / 32)].");

  m.def(
      "pack_float",
      [](const FloatMatrix& weight, ThreadPool* pool, const std::string& isa) {
        const FloatType type = float_type(weight, "weight");
        const int n = static_cast<int>(weight.shape(0)), k = static_cast<int>(weight.shape(1));
        const Layout& layout = *kernels_for(isa).layout;
        nb::gil_scoped_release release;
        return pack_float(weight.data(), type, n, k, layout, pool);
      },
      nb::arg("weight"), nb::arg("pool") = nb::none(), nb::arg("isa") = "",
      nb::sig("def pack_float(weight: numpy.typing.NDArray[numpy.floating | numpy.int16], "
              "pool: ThreadPool | None = None, isa: str = '') -> FloatWeight"),
      "weight [N, K]: float32, float16, or the bits of bfloat16 as int16. Raises ValueError.");

  nb::class_<QuantizedRows>(m, "QuantizedRows", "int8 rows as the GEMM reads them.")
      .def(nb::init<const Matrix<const float>&, std::optional<float>, const std::string&>(), nb::arg("x"),
           nb::arg("scale") = nb::none(), nb::arg("isa") = "",
           "x float32 [M, K]; scale: the static one, None: dynamic per row.")
      .def_prop_ro("codes", &QuantizedRows::codes, nb::rv_policy::automatic, "int8 [M, K rounded up to 32]")
      .def_prop_ro("scales", &QuantizedRows::scales, nb::rv_policy::automatic, "float32 [M, 1]")
      .def_prop_ro("sums", &QuantizedRows::sums, nb::rv_policy::automatic, "int32 [M, ceil(K / 32)], of the codes");

  const auto define = [&m](const char* name, auto function, const char* doc) {
    m.def(name, function, nb::arg("weight"), nb::arg("x"), nb::arg("out"), nb::arg("bias") = nb::none(),
          nb::arg("residual") = nb::none(), nb::arg("rows") = nb::none(), nb::arg("panels") = nb::none(),
          nb::arg("isa") = "", doc);
  };
  define("gemm", &gemm,
         "out [M, N] = x · Wᵀ + bias + residual, for rows (begin, end) and weight panels (begin, end) only.");
  define("gemm_float", &gemm_float<&Kernels::gemm_float, FloatWeight>, "The same with float32 x [M, K].");
  define("gemm_float", &gemm_float<&Kernels::gemm_weight_only, PackedWeight>, "The same with float32 x [M, K].");
}

}  // namespace fptq
