// Schemas of the ops that every device has. `m` is a torch library.
#pragma once

// the arguments of a cell; see rfdarts_fast/ops/compiled/cpu.py, native_conv.py
#define RFDARTS_CELL "Tensor weights, Tensor gamma, Tensor beta, Tensor mix"

template <class Library>
void define_shared_ops(Library& m) {
  m.def("cell_forward(Tensor[] inputs, Tensor[] noise, " RFDARTS_CELL
        ", Tensor? edge_weights, Tensor? moments, int[] spec, float eps, bool bfloat16,"
        " bool together) -> (Tensor[], Tensor, Tensor, Tensor)");
  m.def("cell_kept(Tensor[] inputs, Tensor[] nodes, " RFDARTS_CELL
        ", Tensor moments, int[] spec, float eps, bool bfloat16) -> Tensor");
  m.def("cell_backward(Tensor[] grads, int[] grad_nodes, Tensor[] inputs, Tensor[] nodes, Tensor[] noise, " RFDARTS_CELL
        ", Tensor? edge_weights, Tensor moments, Tensor(a!) kept, int[] spec, float eps, bool bfloat16, int[] wanted)"
        " -> (Tensor[], Tensor, Tensor, Tensor, Tensor)");
  m.def("conv_bn_forward(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] moments, float eps,"
        " bool reduce) -> (Tensor[], Tensor[], Tensor[])");
  m.def("conv_bn_backward(Tensor[] grads, Tensor x, Tensor[] ys, Tensor[] weights, Tensor[] gammas, Tensor[] betas,"
        " Tensor[] moments, float eps, bool training, bool reduce, bool wanted) -> (Tensor, Tensor[], Tensor[])");
  m.def("update_running(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] counts, Tensor moments,"
        " float momentum, int count) -> ()");
}
