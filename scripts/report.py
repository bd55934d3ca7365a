"""carafepp-report: tables, plots and pictures of finished runs, with the figures of the paper; `carafepp-report paper` lists its rows."""

from omegaconf import DictConfig

from .common.app import app, dispatch


@app("report")
def report_runs(cfg: DictConfig) -> None:
    """Print the tables of finished runs, and write tables, plots and pictures."""
    from .reporting.report import report

    report(cfg)


@app("report_paper")
def report_paper(cfg: DictConfig) -> None:
    """Print every table of the paper."""
    from .reporting.overview import report_paper

    report_paper(cfg)


main = dispatch(report_runs, paper=report_paper)

if __name__ == "__main__":
    main()
