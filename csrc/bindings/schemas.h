// Schemas of the ops; every device has all but batch_norm's, which are the CPU's. csrc/README.md has the table of their
// arguments. `m` is a torch library.
#pragma once

// parameters of a cell
#define RFDARTS_CELL "Tensor conv_weights, Tensor gamma, Tensor beta, Tensor op_weights"

template <class Library>
void define_shared_ops(Library& m) {
  m.def("cell_forward(Tensor[] inputs, Tensor[] noise, " RFDARTS_CELL
        ", Tensor? edge_weights, Tensor? moments, int[] cell, float eps, bool bfloat16,"
        " bool bfloat16_products, bool concat, int all_images=0)"
        " -> (Tensor[] nodes, Tensor concat, Tensor branch_outputs, Tensor moments)");
  m.def("cell_branch_outputs(Tensor[] inputs, Tensor[] nodes, " RFDARTS_CELL
        ", Tensor moments, int[] cell, float eps, bool bfloat16, bool bfloat16_products)"
        " -> Tensor");
  m.def("cell_backward(Tensor[] grads, int[] grad_nodes, Tensor[] inputs, Tensor[] nodes, Tensor[] noise, " RFDARTS_CELL
        ", Tensor? edge_weights, Tensor moments, Tensor(a!) branch_outputs, int[] cell, bool training, float eps,"
        " bool bfloat16, bool bfloat16_products, int[] needs_input_grad, int all_images=0)"
        " -> (Tensor[] grad_inputs, Tensor grad_gamma, Tensor grad_beta, Tensor grad_op_weights,"
        " Tensor grad_edge_weights)");
  m.def("relu_conv_bn_forward(Tensor x, Tensor[] conv_weights, Tensor[] gammas, Tensor[] betas, Tensor[] moments,"
        " float eps, bool reduce, bool bfloat16_products, int all_images=0)"
        " -> (Tensor[] outputs, Tensor[] conv_outputs, Tensor[] moments)");
  m.def("relu_conv_bn_backward(Tensor[] grads, Tensor x, Tensor[] conv_outputs, Tensor[] conv_weights,"
        " Tensor[] gammas, Tensor[] betas, Tensor[] moments, float eps, bool training, bool reduce,"
        " bool bfloat16_products, bool needs_input_grad, int all_images=0)"
        " -> (Tensor grad_x, Tensor[] grad_gammas, Tensor[] grad_betas)");
  m.def("batch_norm_forward(Tensor x, Tensor gamma, Tensor beta, Tensor? moments, float eps, bool relu)"
        " -> (Tensor output, Tensor moments)");
  m.def("batch_norm_backward(Tensor grad, Tensor x, Tensor gamma, Tensor beta, Tensor moments, float eps,"
        " bool training, bool relu, bool needs_input_grad) -> (Tensor grad_x, Tensor grad_gamma, Tensor grad_beta)");
  m.def("update_running_stats(Tensor(a!)[] running_means, Tensor(b!)[] running_vars,"
        " Tensor(c!)[] num_batches_tracked, Tensor moments, float momentum, int count) -> ()");
}
