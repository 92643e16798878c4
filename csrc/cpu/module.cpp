// The module of the CPU.
#include "../bindings.h"
#include "kernels.h"

namespace py = pybind11;
using namespace mgrpo;

namespace {

LinearHead linear_head(Address hidden, Address weight, Address bias, int dtype, int64_t num_tokens,
                       int64_t hidden_size, int64_t vocabulary, int64_t hidden_stride, int64_t weight_stride,
                       Address targets, Address temperatures, float temperature, float softcap, int64_t budget_bytes,
                       int num_threads) {
  return {at<void>(hidden), at<void>(weight), at<float>(bias), static_cast<Dtype>(dtype), num_tokens, hidden_size,
          vocabulary, hidden_stride, weight_stride, at<int64_t>(targets), at<float>(temperatures), temperature,
          softcap, budget_bytes, selection().level, num_threads};
}

void linear_token_logprob_fwd(const LinearHead& head, Address top, Address exp, Address exp_x, Address finite_x,
                              Address num_finite, Address z_target) {
  const bool done = selection().kernels->linear_token_logprob_fwd(
      {head, at<float>(top), at<float>(exp), at<float>(exp_x), at<float>(finite_x), at<float>(num_finite),
       at<float>(z_target)});
  if (!done) throw std::bad_alloc();
}

void linear_token_logprob_bwd(const LinearHead& head, Address lse, Address constant, Address onehot, Address slope,
                              Address uniform, Address dhidden, int dhidden_dtype, int64_t dhidden_stride,
                              Address dweight, int64_t dweight_stride, Address dbias) {
  const bool done = selection().kernels->linear_token_logprob_bwd(
      {head, at<float>(lse), at<float>(constant), at<float>(slope), at<float>(onehot), at<float>(uniform),
       at<void>(dhidden), static_cast<Dtype>(dhidden_dtype), dhidden_stride, at<void>(dweight), dweight_stride,
       at<float>(dbias)});
  if (!done) throw std::bad_alloc();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of mgrpo_kernels.";
  selection();  // a wrong MGRPO_CPU_ISA is an error of the import
  m.def("isa", [] { return selection().name; }, "Name of the instruction set in use.");
  bind_operations(m);
  py::class_<LinearHead>(m, "LinearHead").def(py::init(&linear_head));
  m.def("linear_token_logprob_fwd", &linear_token_logprob_fwd, Unlocked());
  m.def("linear_token_logprob_bwd", &linear_token_logprob_bwd, Unlocked());
}
