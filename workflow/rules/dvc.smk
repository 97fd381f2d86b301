# Let Snakemake and DVC share one pipeline (see workflow/scripts/reconcile.py, dvc_bridge.py and stand_in.py). For each stage of
# dvc.yaml:
#   stage_NAME  requests its files: the target of the stage's command in dvc.yaml;
#   dvc_NAME    commits them to DVC as soon as a Snakemake run has made them.
from dvc_bridge import fingerprint, pointers
from failures import Failures
from progress import Progress, Screen
from reconcile import begun_unchanged, check_inputs, drop_surplus_batches, reconcile, refresh
from records import BridgeError, enabled, is_inner, stamp
from run_lock import BusyError, claim, hold, note_executor, owners, refuse_if_busy
from slurm import SlurmError, refuse_endless_waits, tell_reasons
from snakemake.logging import logger
from snakemake.settings.enums import Quietness
from stand_in import go_to_stand_in, leave_no_log, mode

STAMPS = [stamp(target) for target in [*STAGE_FILES, *pointers()]] if enabled() else []
SOURCES = {path for stage in stages().values() for path in stage.sources}
if "campaign" not in stages():
    SOURCES.update([*RAW_IMAGES, "data/raw/frames.csv", *CATALOGUE])

MODE = "run"
try:
    if workflow.is_main_process and not is_inner():
        MODE = mode(dry=workflow.output_settings.dryrun)
        BEGUN = begun_unchanged(["params.yaml", "dvc.yaml", *SOURCES, *PARAMS.bad_pixels.files])
        if MODE == "run":
            claim()
            check_inputs()
        else:
            refuse_if_busy(owners())
            leave_no_log(workflow.logger_manager.get_logfile())
        if MODE == "plan":
            go_to_stand_in()
        if MODE != "errand":
            refresh(SOURCES)
            if enabled():
                reconcile(STAGE_FILES, BEGUN)
except (BusyError, BridgeError, BlobpipeError, OSError) as error:
    raise WorkflowError(str(error))


if workflow.is_main_process and Quietness.RULES in workflow.output_settings.quiet:
    logger.addHandler(Failures(logger))
    in_stage = "DVC_STAGE" in os.environ
    if MODE == "run" and (in_stage or Quietness.PROGRESS not in workflow.output_settings.quiet):
        logger.addHandler(Progress(logger, lambda: not workflow.local_exec))
    for handler in logger.handlers:
        if handler.name == "DefaultStreamHandler":
            handler.addFilter(Screen(dry=MODE == "plan", inner=in_stage))


def look_at_cluster():
    """Write down who runs the jobs. On SLURM, refuse those that could never start, and say why others wait."""
    executor = workflow.executor_plugin.name
    note_executor(executor)
    if executor == "slurm":
        dag = workflow.dag
        jobs = [job for job in dag.needrun_jobs() if not job.is_local]
        refuse_endless_waits({dag.get_job_group(job) or job for job in jobs})
        tell_reasons(logger.warning)


onstart:
    drop_surplus_batches(STAGE_FILES)
    try:
        if not is_inner():
            look_at_cluster()
            if enabled():
                hold()
    except (BusyError, SlurmError) as error:
        raise WorkflowError(str(error))


localrules:
    all,


for _stage, _files in STAGE_FILES.items():

    rule:
        name:
            f"stage_{_stage}"
        input:
            _files,
        log:
            f"logs/stage_{_stage}.log",
        localrule: True
        conda:
            "../envs/blobpipe.yaml"
        params:
            stage=_stage,
            made_from=fingerprint(_stage),
        shell:
            "python workflow/scripts/dvc_bridge.py finish {params.stage} {params.made_from} 2>&1 | tee {log} >&2"

    rule:
        name:
            f"dvc_{_stage}"
        input:
            files=_files,
            sources=stages()[_stage].sources,
            # a commit records whole input folders, so all files in them must be complete, not only those that were read
            read=[path for name in stages()[_stage].upstream for path in STAGE_FILES.get(name, [])],
        output:
            stamp(_stage),
        log:
            f"logs/dvc_{_stage}.log",
        priority: 50
        localrule: True
        conda:
            "../envs/blobpipe.yaml"
        params:
            stage=_stage,
            made_from=fingerprint(_stage),
        shell:
            "python workflow/scripts/dvc_bridge.py commit {params.stage} {params.made_from} 2>&1 | tee {log} >&2"


for _pointer in pointers():

    rule:
        name:
            f"dvc_{Path(_pointer).stem}"
        input:
            RAW_IMAGES,
            "data/raw/frames.csv",
            CATALOGUE,
        output:
            stamp(_pointer),
        log:
            f"logs/dvc_{Path(_pointer).stem}.log",
        priority: 50
        localrule: True
        conda:
            "../envs/blobpipe.yaml"
        params:
            pointer=_pointer,
        shell:
            "python workflow/scripts/dvc_bridge.py commit {params.pointer} 2>&1 | tee {log} >&2"
