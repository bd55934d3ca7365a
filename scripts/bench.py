"""carafepp-bench: times of the operator and others; the first argument can select another bench, of which there are five."""

from omegaconf import DictConfig

from .common.app import app, dispatch


@app("bench")
def time_operator(cfg: DictConfig) -> None:
    """Time the operator and other implementations."""
    from .benching import bench_operator

    bench_operator(cfg)


@app("bench")
def time_growth(cfg: DictConfig) -> None:
    """Time the operator over a range of sizes."""
    from .benching import bench_growth

    bench_growth(cfg)


@app("bench_samplers")
def time_samplers(cfg: DictConfig) -> None:
    """Measure every sampler."""
    from .benching import bench_samplers

    bench_samplers(cfg)


@app("bench_models")
def time_models(cfg: DictConfig) -> None:
    """Measure the networks of a table of the paper."""
    from .benching import bench_models

    bench_models(cfg)


@app("bench_module")
def time_module(cfg: DictConfig) -> None:
    """Measure a CARAFE module and its parts."""
    from .benching import bench_module

    bench_module(cfg)


@app("bench_attention")
def time_attention(cfg: DictConfig) -> None:
    """Measure the attention of a fine map to windows of a coarse one."""
    from .benching import bench_attention

    bench_attention(cfg)


main = dispatch(time_operator, samplers=time_samplers, models=time_models, module=time_module, attention=time_attention, growth=time_growth)

if __name__ == "__main__":
    main()
