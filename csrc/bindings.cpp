// One Python function per launcher. Pointers come as integers, 0 for none; native.py has checked all that they point
// to. The interpreter's lock is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace mgrpo;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Unlocked = py::call_guard<py::gil_scoped_release>;

LogitRows logit_rows(Address logits, int dtype, int64_t num_rows, int64_t vocabulary, int64_t stride, Address targets,
                     Address mask, Address temperatures, float temperature, float softcap) {
  return {at<void>(logits), static_cast<Dtype>(dtype), num_rows, vocabulary, stride, at<int64_t>(targets),
          at<bool>(mask), at<float>(temperatures), temperature, softcap};
}

void token_logprob_fwd(const LogitRows& rows, Address logprob, Address entropy, Address lse, Address self_certainty,
                       Address num_finite, int num_threads) {
  selection().kernels->token_logprob_fwd({rows, at<float>(logprob), at<float>(entropy), at<float>(lse),
                                          at<float>(self_certainty), at<float>(num_finite), num_threads});
}

void token_logprob_bwd(const LogitRows& rows, Address logprob, Address entropy, Address lse, Address num_finite,
                       Address dlogprob, Address dentropy, Address dlse, Address dself_certainty, Address dlogits,
                       int64_t dlogits_stride, int num_threads) {
  selection().kernels->token_logprob_bwd({rows, at<float>(logprob), at<float>(entropy), at<float>(lse),
                                          at<float>(num_finite), at<float>(dlogprob), at<float>(dentropy),
                                          at<float>(dlse), at<float>(dself_certainty), at<void>(dlogits),
                                          dlogits_stride, num_threads});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of mgrpo_kernels.";
  selection();  // a wrong MGRPO_CPU_ISA is an error of the import
  m.def("isa", [] { return selection().name; }, "Name of the instruction set in use.");

  py::class_<LogitRows>(m, "LogitRows").def(py::init(&logit_rows));
  m.def("token_logprob_fwd", &token_logprob_fwd, Unlocked());
  m.def("token_logprob_bwd", &token_logprob_bwd, Unlocked());
}
