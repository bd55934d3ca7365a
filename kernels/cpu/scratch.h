// The memory of one task, by name.
#pragma once

#include "index.h"
#include "layout.h"
#include "tiling.h"

namespace carafepp {

// Planes in sets: the weights of a tap, the pixels of a channel.
template <class T> struct Planes {
    T* data;      // the tile's own first cell in the first plane
    Index plane;  // values from a plane to the next
    Index set;    // values from a set to the next

    T* at(Index set_number, Index plane_number) const { return data + set_number * set + plane_number * plane; }
};

// Divides one block of memory into named planes, as many of each kind as `Layout` says.
template <class T> struct Scratch {
    Planes<T> weights, lse, output, doutput, dweights, spare, dsource, source;

    // number of values in the block
    static Index size(const Layout& layout, const Grid& grid) {
        return layout.planes(false) * grid.bare_plane + layout.planes(true) * grid.haloed_plane;
    }
    Scratch(const Layout& layout, const Grid& grid, T* memory)
        : weights(take(layout.weights, grid, memory)), lse(take(layout.lse, grid, memory)), output(take(layout.output, grid, memory)),
          doutput(take(layout.doutput, grid, memory)), dweights(take(layout.dweights, grid, memory)),
          spare(take(layout.spare, grid, memory)), dsource(take(layout.dsource, grid, memory)),
          source(take(layout.source, grid, memory)) {}

private:
    // Cuts the planes of one kind off the front of `memory`.
    static Planes<T> take(const PlaneSets& kind, const Grid& grid, T*& memory) {
        const Index plane = grid.plane(kind.halo), set = kind.planes * plane;
        T* first = memory + (kind.halo ? grid.origin : 0);
        memory += kind.sets * set;
        return {first, plane, set};
    }
};

}  // namespace carafepp
