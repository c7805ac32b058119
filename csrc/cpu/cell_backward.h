// What the phases of a cell's backward share. csrc/README.md derives the gradients.
#pragma once
#include "cpu/cell_context.h"

namespace rfdarts {

template <class T, class S>
struct BackwardContext : CellContext<T, S> {
  using CellContext<T, S>::cell;
  using CellContext<T, S>::cm;

  const CellBackward<T, S>& gradients;
  // per node: the gradient at the mixed op's output, and where channels bypass it the whole gradient, both dense
  std::vector<const T*> mixed_grad, node_grad;
  // per state, null where there is none yet
  std::vector<BatchView<T>> state_grad;
  // per BatchNorm: NormBackward::coefficients
  std::vector<Coefficients<T>> coefficients;
  std::vector<double> grad_edge_weights;

  BackwardContext(const Cell& cell, const CellBackward<T, S>& gradients, const Parallel& parallel,
                  const Allocate& allocate)
      : CellContext<T, S>(cell, gradients.forward, parallel, allocate), gradients(gradients), mixed_grad(cell.nodes),
        node_grad(cell.nodes), state_grad(cell.states()), coefficients(cell.norms),
        grad_edge_weights(cell.edges.size()) {
    for (int s = 0; s < cell.states(); s++)
      if (!cell.sources[s].edges.empty()) this->plan_dense(s, wants_dots());
    for (int i = 0; i < cell.nodes; i++) state_grad[cell.inputs + i] = gradients.grad_nodes[i];
    std::fill_n(gradients.grad_gamma, cell.norms * cm, T(0));
    std::fill_n(gradients.grad_beta, cell.norms * cm, T(0));
    std::fill_n(gradients.grad_op_weights, cell.edges.size() * cell.primitives, T(0));
  }
  // the edge weights' gradients have a part from what bypasses the mixed ops
  bool wants_dots() const { return cell.K > 1 && gradients.grad_edge_weights; }
  NormBackward<T, T, S> norm_backward(int norm, const T* g, const S* y) const {
    return {g, y, coefficients[norm].row(0)};
  }

  // From sum g and sum g (y - mean) per channel at the output of a BatchNorm whose term has a weight: the gradients of
  // gamma and beta, and the coefficients of its input's gradient. Returns the sum over channels of g z.
  double finish_norm(int norm, double weight, const double* g_sum, const double* dot) {
    double total = 0, m = double(cell.images * cell.pixels());
    Coefficients<T>& rows = coefficients[norm] = Coefficients<T>(kNormRows, cm, this->period);
    for (int64_t i = 0; i < cm; i++) {
      double rstd = this->rstd(norm, i), gamma = this->gamma(norm, i), dot_y_hat = dot[i] * rstd;
      gradients.grad_gamma[norm * cm + i] = T(weight * dot_y_hat);
      gradients.grad_beta[norm * cm + i] = T(weight * g_sum[i]);
      total += gamma * dot_y_hat + this->beta(norm, i) * g_sum[i];
      double scale = weight * gamma * rstd;
      rows.set(kScale, i, scale);
      rows.set(kSlope, i, cell.training ? -scale * dot_y_hat * rstd / m : 0);
      rows.set(kMean, i, this->mean(norm, i));
      rows.set(kShift, i, cell.training ? -scale * g_sum[i] / m : 0);
    }
    return total;
  }
};

}  // namespace rfdarts
