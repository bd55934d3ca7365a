"""carafepp-bench: the operator beside its rivals, in one process and in turns; `carafepp-bench samplers` measures the samplers,
`carafepp-bench models` the networks of the paper's tables."""

from .benching import bench_growth, bench_models, bench_operator, bench_samplers
from .common.app import dispatch

main = dispatch(bench_operator, samplers=bench_samplers, models=bench_models, growth=bench_growth)

if __name__ == "__main__":
    main()
