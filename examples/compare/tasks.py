"""The tasks that examples.compare compares methods on."""

from collections.abc import Callable

from examples.lavin.easy_vqa import lavin_easy_vqa
from examples.meter.tasks import meter_nlvr2, meter_retrieval, meter_vqa
from examples.shared.task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "lavin-easy-vqa": lavin_easy_vqa,
    "meter-vqa": meter_vqa,
    "meter-nlvr2": meter_nlvr2,
    "meter-retrieval": meter_retrieval,
}
