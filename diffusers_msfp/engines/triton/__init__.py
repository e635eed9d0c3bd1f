"""Kernels for CUDA devices, as functions on tensors: no modules, no state.

Triton comes with CUDA builds of torch and is optional: `conv2d`, `input_codes` and `w4a16` import it, `gemm`,
`device_codes` and `capability` do not. Kernels use only Triton's builtins, none of its library that is itself written
in Triton, so that they run under the interpreter (`TRITON_INTERPRET=1`) also where something else has imported Triton
before.

Codes travel as whole numbers `c = q - offset` with the lattice integer `q`, in int8 or bfloat16; the
offset is 128 where an unsigned format does not fit int8 otherwise, else 0. `zero` is the code of the real 0, that is
`k - offset`: what a convolution pads with, and what its sums are corrected by: `Σ (q - k) w = Σ c w - zero Σ w`.
"""
