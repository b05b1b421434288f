"""``close_run``: the end of a pipeline run on a cluster, whatever happened: its MLflow run is ended."""

from kfp import dsl

from graftwork.components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def close_run(status: dsl.PipelineTaskFinalStatus, data: str = "", backbone: str = ""):
    """Ends the pipeline run's MLflow run and carries what steps could not, whatever happened.

    Args:
        status: How the steps ended.
        data: The source, for the run's name.
        backbone: The network, for the run's name.
    """
    from graftwork import steps

    steps.close_run(status.state, status.error_message or "", data=data, backbone=backbone)
