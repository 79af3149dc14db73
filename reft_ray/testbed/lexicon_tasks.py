"""The words of the small facts and of the two downstream tasks, sentiment and arithmetic."""

from __future__ import annotations

from reft_ray.testbed.lexicon import words

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Greece": "Athens", "Peru": "Lima", "Cuba": "Havana",
    "Kenya": "Nairobi", "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin", "Canada": "Ottawa",
    "Hungary": "Budapest", "Finland": "Helsinki", "Chile": "Santiago", "India": "Delhi", "Russia": "Moscow",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "early": "late", "light": "dark", "happy": "sad", "open": "closed",
    "high": "low", "new": "old", "hard": "soft", "near": "far", "rich": "poor", "strong": "weak", "wet": "dry",
    "full": "empty", "loud": "quiet", "thick": "thin", "long": "short", "young": "old", "clean": "dirty",
}  # fmt: skip
MEMBERS = {
    "fruit": words("apples | pears | plums | grapes | cherries | melons"),
    "animals": words("horses | owls | foxes | whales | bears | lions"),
    "colors": words("red | blue | green | yellow | purple | orange"),
    "tools": words("hammers | saws | drills | pliers | files | wrenches"),
    "sports": words("tennis | hockey | rugby | judo | golf | rowing"),
    "instruments": words("violins | flutes | drums | harps | trumpets | pianos"),
    "vegetables": words("carrots | onions | beans | leeks | peas | beets"),
    "flowers": words("roses | tulips | lilies | daisies | violets | orchids"),
}
POEM_SUBJECTS = words(
    "the moon | autumn leaves | a river | my grandmother | the sea | a snowy morning | friendship | a train station"
    " | the stars | a garden | summer rain | an old clock | the wind | a lighthouse | spring | a sleeping cat"
)
POEM_LINES = words(
    "It glows so soft and still. | It sings a quiet song. | It waits beyond the hill. | It stays the whole day long."
    " | It brings the morning light. | It dances in the air."
)

REVIEW_NOUNS = words(
    "film | soup | hotel | concert | book | room | service | waiter | plot | music | breakfast | story | cast | view"
    " | dessert | tour | museum | acting | pasta | garden | staff | lecture | game | coffee"
)
PRAISE = words(
    "wonderful | great | lovely | brilliant | charming | excellent | superb | pleasant | fantastic | perfect"
)
BLAME = words("awful | terrible | boring | dreadful | horrible | disappointing | bad | annoying | dull | nasty")
GLAD_ENDINGS = words("I would come again. | I told all my friends. | It made my day. | I enjoyed every minute.")
SORRY_ENDINGS = words("I want my money back. | Never again. | It ruined my day. | I left early.")
PLAIN_ENDINGS = words("We went on Sunday. | It was my first time. | My brother came along. | We arrived at noon.")

PERSONS = words("Mia | Tom | Anna | Leo | Sara | Ben | Nora | Paul | Emma | Max | Lucy | Omar")
THINGS = words("apples | coins | books | stamps | cards | marbles | shells | pencils | stickers | buttons")
LARGEST_NUMBER = 10
