// Pixels of maps whose channels are adjacent in memory: those of windows, of outputs, and of other neighbourhoods of a cell. A pixel is the
// address of the channels of the task's group.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "borders.h"
#include "call.h"
#include "index.h"
#include "tiling.h"
#include "vectors.h"
#include "windows.h"

namespace carafepp {

// A map of which every cell owns factor * factor pixels.
template <class S> struct PixelMap {
    S* data;
    Index row_stride, column_stride, height, width, factor;
    Padding padding;

    // null for a zero outside the map
    S* pixel(Index row, Index column) const {
        row = padding.pixel(row, height), column = padding.pixel(column, width);
        return row < 0 || column < 0 ? nullptr : data + row * row_stride + column * column_stride;
    }
    // whether the cells within `halo` of a cell own no pixel outside the map
    bool inside(Index row, Index column, Index halo) const {
        return row >= halo && column >= halo && (row + halo + 1) * factor <= height && (column + halo + 1) * factor <= width;
    }
};
template <class S> PixelMap<S> source_pixels(const Task& task, const Tensor& x, const Padding& padding) {
    const Problem& problem = task.problem;
    S* data = x.at<S>(task.image, task.first_channel());
    return {data, x.strides[2], x.strides[3], problem.height, problem.width, problem.down, padding};
}
template <class S> PixelMap<S> output_pixels(const Task& task, const Tensor& y) {
    const Problem& problem = task.problem;
    S* data = y.at<S>(task.image, task.first_channel());
    return {data, y.strides[2], y.strides[3], problem.output_rows, problem.output_columns, problem.up, Padding{}};
}

// The source pixels of a window, tap by tap.
template <class S> struct WindowPixels {
    PixelMap<const S> map;
    Index kernel;
    std::vector<Index> offsets;  // from the first pixel of a window inside the map
    std::vector<Index> columns;
    std::vector<S> zeros;  // replaces pixels outside the map
    std::vector<const S*> pixels;

    explicit WindowPixels(const Task& task)
        : map(source_pixels<const S>(task, task.call.x, padding(task.problem))), kernel(task.problem.kernel), offsets(kernel * kernel),
          columns(kernel), zeros(task.problem.group_channels()), pixels(kernel * kernel) {
        for (Index k = 0; k < kernel * kernel; ++k) offsets[k] = k / kernel * map.row_stride + k % kernel * map.column_stride;
    }
    // Finds the pixels of the window with its first tap at a place that may lie outside the map.
    void find(Index row, Index column) {
        const S** to = pixels.data();
        if (row >= 0 && column >= 0 && row + kernel <= map.height && column + kernel <= map.width) {
            const S* first = map.data + row * map.row_stride + column * map.column_stride;
            for (const Index offset : offsets) *to++ = first + offset;
            return;
        }
        for (Index k = 0; k < kernel; ++k) columns[k] = map.padding.pixel(column + k, map.width);
        for (Index k = 0; k < kernel; ++k) {
            const Index found = map.padding.pixel(row + k, map.height);
            for (const Index place : columns)
                *to++ = found < 0 || place < 0 ? zeros.data() : map.data + found * map.row_stride + place * map.column_stride;
        }
    }
};

// The output pixels of a run of sub-pixels, and the place of the window that they share.
template <class S> struct RunPixels {
    SubRun run;
    Index window_row, window_column;                 // of the first tap, relative to the first source pixel of the cell
    std::array<Index, SUBS> rows, columns, offsets;  // relative to the first output pixel of the cell

    RunPixels(const Task& task, const SubRun& run, const PixelMap<S>& map) : run(run) {
        const Index down = task.problem.down;
        const TapSource& first = task.windows.source(run.first, 0);
        window_row = first.move_rows * down + first.phase / down, window_column = first.move_columns * down + first.phase % down;
        for (Index s = 0; s < run.count; ++s) {
            rows[s] = (run.first + s) / map.factor, columns[s] = (run.first + s) % map.factor;
            offsets[s] = rows[s] * map.row_stride + columns[s] * map.column_stride;
        }
    }
    // Finds the outputs of a cell; `absent` replaces those that a rational scale cuts off the last cell.
    void find(const PixelMap<S>& map, Index cell_row, Index cell_column, S* absent, S** pixels) const {
        const Index row = cell_row * map.factor, column = cell_column * map.factor;
        S* first = map.data + row * map.row_stride + column * map.column_stride;
        for (Index s = 0; s < run.count; ++s)
            pixels[s] = row + rows[s] < map.height && column + columns[s] < map.width ? first + offsets[s] : absent;
    }
};
template <class S> std::vector<RunPixels<S>> output_runs(const Task& task, const PixelMap<S>& map) {
    std::vector<RunPixels<S>> runs;
    for (const SubRun& run : task.windows.runs) runs.emplace_back(task, run, map);
    return runs;
}

// The steps from the first pixel of a cell to the pixels of a neighbourhood of any form.
struct Steps {
    std::vector<Index> rows, columns, offsets;

    template <class S> void add(const PixelMap<S>& map, Index row, Index column) {
        rows.push_back(row), columns.push_back(column), offsets.push_back(row * map.row_stride + column * map.column_stride);
    }
    // Finds the pixels. `zeros` replaces pixels outside the map; a cell that is `inside` has none.
    template <class S>
    void find(const PixelMap<S>& map, Index cell_row, Index cell_column, bool inside, S* zeros, std::vector<S*>& pixels) const {
        const Index row = cell_row * map.factor, column = cell_column * map.factor;
        if (inside) {
            S* first = map.data + row * map.row_stride + column * map.column_stride;
            for (std::size_t k = 0; k < offsets.size(); ++k) pixels[k] = first + offsets[k];
            return;
        }
        for (std::size_t k = 0; k < offsets.size(); ++k) {
            S* pixel = map.pixel(row + rows[k], column + columns[k]);
            pixels[k] = pixel ? pixel : zeros;
        }
    }
};

}  // namespace carafepp
