"""ARC: tasks out of a dataset, prompts out of tasks, and scores of what a model answered.

```
 rows -> transform -> tasks -> write_prompts -> prompts -> `actstore generate` -> answers -> score
```
"""

from extract.arc.grids import Grid, grid_text
from extract.arc.parsing import parse_grid
from extract.arc.prompting import SYSTEM, Prompted, plain_text, write_prompts
from extract.arc.scoring import Scored, read_predictions, score
from extract.arc.sources import read_tasks
from extract.arc.tasks import Pair, Task
from extract.arc.transforming import Transformed, transform_files, transform_rows

__all__ = [
    "SYSTEM", "Grid", "Pair", "Prompted", "Scored", "Task", "Transformed", "grid_text", "parse_grid", "plain_text",
    "read_predictions", "read_tasks", "score", "transform_files", "transform_rows", "write_prompts",
]  # fmt: skip
