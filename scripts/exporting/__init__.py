"""The parts of `carafepp-export`: the range of sizes, the formats of files, and the comparison of a file with its network."""
