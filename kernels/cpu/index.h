// Signed sizes and offsets, and their divisions.
#pragma once

#include <cstddef>

namespace carafepp {

using Index = std::ptrdiff_t;

// Both take a positive divisor; ceil_div takes a dividend that is not negative.
inline Index floor_div(Index a, Index b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace carafepp
