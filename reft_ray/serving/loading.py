"""Load a teacher from the operator's arguments and check it on its canaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reft_ray.core.cache import CachedScorer
from reft_ray.core.errors import ReftError
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Decision
from reft_ray.serving.args import CanaryArgs, TeacherArgs
from reft_ray.teachers import BUILTIN, teacher_folder

# Used if no pair is configured: later scores must equal those at loading, whatever they were.
_PROBES = CanaryArgs(harmful="How do I build a bomb?", harmless="How do I bake bread?")
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """A scorer, plain and cached, its canary scores at loading, and its calibration histogram over [-1, 1]."""

    args: TeacherArgs
    plain: Scorer
    cached: Scorer
    expected: tuple[float, ...]
    histogram: tuple[int, ...] = ()

    def canary_scores(self) -> tuple[float, ...]:
        """Score the canary pair without the cache: (harmful, harmless)."""
        return tuple(_canary_scores(self.plain, self.args))

    def canary_decisions(self, scores: Sequence[float]) -> tuple[Decision, ...]:
        """The decisions for these canary scores; empty without a configured pair."""
        return tuple(self.plain.thresholds.decide(score) for score in scores) if self.args.canary else ()

    def check(self, scores: Sequence[float]) -> None:
        """Raises ReftError when a canary's score has changed since loading."""
        for name, score, expected in zip(("harmful", "harmless"), scores, self.expected, strict=True):
            if not abs(score - expected) <= _TOLERANCE:
                raise ReftError(
                    f"teacher {self.plain.teacher_id} scores the {name} canary {score:.4f}, at loading it was "
                    f"{expected:.4f}: this replica must be replaced"
                )


def load_teacher(args: TeacherArgs) -> LoadedTeacher:
    """Load and check a teacher.

    Raises ReftError when it cannot be loaded, when a score is not a cosine, or when a configured canary is misjudged.
    """
    scorer, histogram = _scorer(args)
    scores = _canary_scores(scorer, args)
    if not all(math.isfinite(score) and abs(score) <= 1.001 for score in scores):
        raise ReftError(f"teacher {scorer.teacher_id} scores its canaries {scores}, which are not cosines")
    if args.canary is not None:
        harmful, harmless = (scorer.thresholds.decide(score) for score in scores)
        if harmful is Decision.ALLOW or harmless is not Decision.ALLOW:
            raise ReftError(
                f"teacher {scorer.teacher_id} misjudges the canaries (harmful: {harmful}, harmless: {harmless}): "
                "check `canary` and the teacher's thresholds"
            )
    cached = CachedScorer(scorer, args.cache_texts) if args.cache_texts else scorer
    return LoadedTeacher(args, scorer, cached, tuple(scores), tuple(histogram))


def pinned(args: TeacherArgs) -> TeacherArgs:
    """The arguments with the directory that `teacher` links to now, for one that is a link."""
    path = Path(args.teacher)
    return args.model_copy(update={"teacher": str(path.resolve())}) if path.is_symlink() else args


def approximate_tokens(texts: Sequence[str]) -> int:
    """The tokens of texts, estimated for batching: one per four characters, and eight for the template."""
    return sum(len(text) // 4 + 8 for text in texts)


def _canary_scores(scorer: Scorer, args: TeacherArgs) -> list[float]:
    pair = args.canary or _PROBES
    return [result.score for result in scorer.score([pair.harmful, pair.harmless])]


def _scorer(args: TeacherArgs) -> tuple[Scorer, Sequence[int]]:
    if args.scorer == "words":
        from reft_ray.testbed.word_scorer import WordScorer

        return WordScorer(args.teacher if args.teacher != BUILTIN else "rt-words"), ()
    from reft_ray.hf.ref_teacher import RefTeacher

    teacher = RefTeacher.load(teacher_folder(args.teacher))
    scorer = teacher.scorer(
        base_name=args.base,
        device=args.device,
        precision=args.precision,
        window_tokens=args.window_tokens,
        batch_tokens=args.batch_tokens,
    )
    return scorer, teacher.manifest.histogram
