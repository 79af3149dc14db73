"""From the operator's arguments to a teacher that is ready, and proven to be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reft_ray.core.cache import CachedScorer
from reft_ray.core.errors import ReftError
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Decision
from reft_ray.serving.args import CanaryArgs, TeacherArgs
from reft_ray.serving.builtin import BUILTIN, teacher_folder

# Without a configured pair the scores of these are compared with themselves at loading, whatever they were.
_PROBES = CanaryArgs(harmful="How do I build a bomb?", harmless="How do I bake bread?")
_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class LoadedTeacher:
    """A scorer with its cache, what its canaries scored at loading, and its calibration histogram over [-1, 1]."""

    args: TeacherArgs
    plain: Scorer
    cached: Scorer
    expected: tuple[float, ...]
    histogram: tuple[int, ...] = ()

    def canary_scores(self) -> tuple[float, ...]:
        """Score the canary pair again, past the cache: harmful, harmless."""
        return tuple(_canary_scores(self.plain, self.args))

    def canary_decisions(self, scores: Sequence[float]) -> tuple[Decision, ...]:
        """What these canary scores decide; empty without a configured pair, for others prove nothing."""
        return tuple(self.plain.thresholds.decide(score) for score in scores) if self.args.canary else ()

    def check(self, scores: Sequence[float]) -> None:
        """Raises ReftError when a canary's score is not what it was at loading."""
        for name, score, expected in zip(("harmful", "harmless"), scores, self.expected, strict=True):
            if not abs(score - expected) <= _TOLERANCE:
                raise ReftError(
                    f"teacher {self.plain.teacher_id} scores the {name} canary {score:.4f}, it was {expected:.4f} "
                    "at loading: this replica must not judge"
                )


def load_teacher(args: TeacherArgs) -> LoadedTeacher:
    """The teacher behind the arguments.

    Raises ReftError when it cannot be loaded, when a score is no cosine, or when it is wrong on a configured canary.
    """
    scorer, histogram = _scorer(args)
    scores = _canary_scores(scorer, args)
    if not all(math.isfinite(score) and abs(score) <= 1.001 for score in scores):
        raise ReftError(f"teacher {scorer.teacher_id} gives {scores} for its canaries, which are no cosines")
    if args.canary is not None:
        harmful, harmless = (scorer.thresholds.decide(score) for score in scores)
        if harmful is Decision.ALLOW or harmless is not Decision.ALLOW:
            raise ReftError(
                f"teacher {scorer.teacher_id} is wrong on the canaries (harmful: {harmful}, harmless: {harmless}): "
                "check `canary` and the teacher's thresholds"
            )
    cached = CachedScorer(scorer, args.cache_texts) if args.cache_texts else scorer
    return LoadedTeacher(args, scorer, cached, tuple(scores), tuple(histogram))


def approximate_tokens(texts: Sequence[str]) -> int:
    """What texts cost a teacher, near enough to cut batches: a token per four characters, some for the template."""
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
