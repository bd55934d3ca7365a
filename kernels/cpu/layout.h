// The planes that hold a tile of cells, and the number of each kind that a task needs.
//
// Over cells, reassembly is a sum of products of shifted planes. A plane holds one value per cell of a tile, with the rows laid end to end:
// the weights of one (tap, sub-pixel), the source pixels of one phase (row % down, column % down), the outputs of one sub-pixel. The
// source pixel that a tap of a sub-pixel reads then lies in one phase plane at a constant distance ("shift") that is the same for all cells:
//
//     output[sub][f]       = sum over taps       weight[tap][sub][f] * source[phase][f + shift]
//     dweight[tap][sub][f] = sum over channels   doutput[sub][f] * source[phase][f + shift]
//     dsource[phase][f]    = sum over (tap, sub) weight[tap][sub][f - shift] * doutput[sub][f - shift]
//
// Upsampling, downsampling, rational scales, kernel sizes and memory formats differ only in the table of shifts and in the way planes are
// read and written.
#pragma once

#include <array>

#include "call.h"
#include "index.h"

namespace carafepp {

// `sets` (taps or channels) of `planes` (sub-pixels or phases) each; planes with a halo also hold cells around the tile.
struct PlaneSets {
    Index sets = 0, planes = 0;
    bool halo = false;
};

struct Layout {
    PlaneSets weights;   // [tap][sub], first the logits
    PlaneSets lse;       // [0 or 1][sub]
    PlaneSets output;    // [channel][sub]
    PlaneSets doutput;   // [channel][sub], gradients of the output
    PlaneSets dweights;  // [tap][sub], gradients of the weights, then of the logits
    PlaneSets spare;     // [1][1]
    PlaneSets dsource;   // [channel][phase], gradients of the source
    PlaneSets source;    // [channel][phase]

    // `channels` is the number of channels held at a time, 0 where maps are read and written in place
    static Layout forward(const Call& call, Index channels) {
        const Problem& problem = call.problem;
        Layout layout;
        layout.weights = {problem.taps(), problem.subs(), false};
        layout.lse = {call.lse ? 1 : 0, problem.subs(), false};
        layout.output = {channels, problem.subs(), false};
        layout.source = {channels, problem.phases(), true};
        return layout;
    }
    static Layout backward(const Call& call, Index channels) {
        const Problem& problem = call.problem;
        // dsource sums weights and output gradients of cells around the tile
        const bool halo(call.dx);
        Layout layout;
        layout.weights = {problem.taps(), problem.subs(), halo};
        layout.lse = {call.lse ? 1 : 0, problem.subs(), halo};
        layout.doutput = {channels, problem.subs(), halo};
        if (call.dlogits) {
            layout.dweights = {problem.taps(), problem.subs(), false};
            layout.spare = {1, 1, false};
        }
        layout.dsource = {channels, problem.phases(), false};
        layout.source = {channels, problem.phases(), true};
        return layout;
    }
    // Counts the planes of all kinds with a halo, or of all kinds without one.
    Index planes(bool halo) const {
        Index count = 0;
        for (const PlaneSets& kind : std::array<PlaneSets, 8>{weights, lse, output, doutput, dweights, spare, dsource, source})
            if (kind.halo == halo) count += kind.sets * kind.planes;
        return count;
    }
};

}  // namespace carafepp
