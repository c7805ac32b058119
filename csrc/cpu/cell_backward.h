// What the phases of a cell's backward share. csrc/README.md derives the gradients.
#pragma once
#include "cpu/cell_context.h"

namespace rfdarts {

template <class T, class S>
struct BackwardContext : CellContext<T, S> {
  using CellContext<T, S>::cell;
  using CellContext<T, S>::cm;

  const CellBackward& gradients;
  T *grad_gamma = static_cast<T*>(gradients.grad_gamma), *grad_beta = static_cast<T*>(gradients.grad_beta);
  T* grad_op_weights = static_cast<T*>(gradients.grad_op_weights);
  // per node: the gradient at the mixed op's output, and where channels bypass it the whole gradient, both dense
  std::vector<const T*> mixed_grad, node_grad;
  // per state, null where there is none yet
  std::vector<BatchView<T>> state_grad;
  // per BatchNorm: NormBackward::coefficients
  std::vector<Coefficients<T>> coefficients;
  std::vector<double> grad_edge_weights;

  BackwardContext(const Cell& cell, const CellBackward& gradients, const Parallel& parallel,
                  const Allocate& allocate)
      : CellContext<T, S>(cell, gradients.forward, parallel, allocate), gradients(gradients), mixed_grad(cell.nodes),
        node_grad(cell.nodes), state_grad(cell.states()), coefficients(cell.norms),
        grad_edge_weights(cell.edges.size()) {
    for (int s = 0; s < cell.states(); s++)
      if (!cell.sources[s].edges.empty()) this->plan_dense(s, wants_dots());
    for (int i = 0; i < cell.nodes; i++) state_grad[cell.inputs + i] = BatchView<T>(gradients.grad_nodes[i]);
    std::fill_n(grad_gamma, cell.norms * cm, T(0));
    std::fill_n(grad_beta, cell.norms * cm, T(0));
    std::fill_n(grad_op_weights, cell.edges.size() * cell.primitives, T(0));
  }
  // the edge weights' gradients have a part from what bypasses the mixed ops
  bool wants_dots() const { return cell.K > 1 && gradients.grad_edge_weights; }
  NormBackward<T, T, S> norm_backward(int norm, const T* g, const S* y) const {
    return {g, y, coefficients[norm].row(0)};
  }

  // sum g and sum g (y - mean) per channel, at the output of a BatchNorm
  struct NormSums {
    const double *g, *dot;
  };
  // `sums` of this process, of all
  std::vector<double> over_processes(std::vector<double> sums) const {
    const SumOverProcesses& sum = this->data.processes.sum;
    if (sum && cell.training) sum(sums.data(), sums.size());
    return sums;
  }
  // For a BatchNorm whose term has a weight, from the sums of this process and of all: the gradients of gamma and beta,
  // which are this process's, and the coefficients of its input's gradient. Returns the sum over channels of g z.
  double finish_norm(int norm, double weight, NormSums own, NormSums all) {
    double total = 0, m = this->count();
    Coefficients<T>& rows = coefficients[norm] = Coefficients<T>(kNormRows, cm, this->period);
    for (int64_t i = 0; i < cm; i++) {
      double rstd = this->rstd(norm, i), gamma = this->gamma(norm, i), dot_y_hat = own.dot[i] * rstd;
      grad_gamma[norm * cm + i] = T(weight * dot_y_hat);
      grad_beta[norm * cm + i] = T(weight * own.g[i]);
      total += gamma * dot_y_hat + this->beta(norm, i) * own.g[i];
      double scale = weight * gamma * rstd;
      rows.set(kScale, i, scale);
      rows.set(kSlope, i, cell.training ? -scale * (all.dot[i] * rstd) * rstd / m : 0);
      rows.set(kMean, i, this->mean(norm, i));
      rows.set(kShift, i, cell.training ? -scale * all.g[i] / m : 0);
    }
    return total;
  }
};

}  // namespace rfdarts
