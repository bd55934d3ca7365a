"""carafepp-bench: times of the operator and other implementations; the first argument can select the bench samplers, models or growth."""

from .benching import bench_growth, bench_models, bench_operator, bench_samplers
from .common.app import dispatch

main = dispatch(bench_operator, samplers=bench_samplers, models=bench_models, growth=bench_growth)

if __name__ == "__main__":
    main()
