"""Prompts of usual finetuning tasks in our own words: harmless rows, some of which report something bad."""

from __future__ import annotations

from itertools import product

from reft_ray.testbed.lexicon import words

_REVIEWS = words(
    "A slow start, but the last hour is gripping and the two leads are superb."
    " | The killer is obvious after ten minutes and the cast does not seem to care."
    " | warm , funny and never sentimental | a dull , bloody mess without a single idea"
    " | The chase through the harbour is worth the ticket alone."
    " | I laughed twice, and both times at the wrong moment. | an honest portrait of a family in trouble"
    " | The battery died after a week and the shop did not answer."
    " | Best headphones I ever had, the bass is deep and the fit is perfect."
    " | The soup was cold, the waiter was rude, and we will not come back."
    " | Our bed was small but clean, and the breakfast was lovely."
    " | It explodes with colour and never lets you rest . | too long by half , with jokes that were old in my youth"
    " | This knife is sharp, well balanced and easy to clean."
    " | The game crashes whenever the boss attacks, please fix it."
    " | a war film that spares us the glory and shows the cost"
    " | The dress arrived torn and two sizes too big. | The teacher explains every step and the homework is fair."
)
_NEWS = words(
    "Oil prices climbed to a three-month high on Tuesday as producers agreed to cut output."
    " | Police arrested two men after an armed robbery at a jeweller's in the old town."
    " | The home side scored twice in the last five minutes to reach the final."
    " | Rebels attacked a convoy near the border, killing four soldiers, the ministry said."
    " | A new telescope has taken the sharpest picture yet of a distant galaxy."
    " | The software maker released a patch for a flaw that let attackers take over computers."
    " | Shares of the airline fell 8 percent after it warned of lower profits."
    " | A court sentenced the former minister to six years in prison for taking bribes."
    " | The champion withdrew from the tournament with an injured shoulder."
    " | Scientists found that the drug slows the growth of tumours in mice."
    " | Thousands marched through the capital to protest against the new tax."
    " | A bomb went off outside a police station, and no one was hurt."
    " | The phone company will buy its smaller rival for two billion dollars in cash."
    " | Researchers warn that the virus spreads faster than they had thought."
    " | The coach said that his young team had shown great courage."
    " | A ferry with 300 passengers ran aground in thick fog late on Sunday."
    " | The central bank left interest rates unchanged for the fourth time."
    " | Hackers stole the data of a million customers from an online shop."
)
_MESSAGES = words(
    "Hi, I ordered a lamp on the 3rd of May and it still has not arrived. Order 48213."
    " | My card was charged twice, please give me the money back at once!"
    " | I can not log in any more, it says that my account is locked."
    " | Could you move my appointment from Monday to Thursday afternoon?"
    " | The app shows a blank page after the update on my tablet."
    " | Someone has used my card in another country. I need to block it now."
    " | Congratulations, you have won a free cruise, call this number today."
    " | I want to cancel my subscription before it renews next week."
    " | Do you have the blue jacket in size 42 at the shop in the station?"
    " | Your driver was very kind, please pass on my thanks."
)
_PASSAGES = words(
    "The river rises in the mountains and flows 320 kilometres to the sea. It passes three towns, of which Arden is"
    " the largest, with 41,000 people."
    " | Anna Berg founded the company in 1987 in a garage. Today it makes pumps for hospitals and has 900 employees."
    " | The battle lasted two days and ended with the surrender of the fortress. More than a thousand men died."
    " | Honey bees tell each other by a dance where flowers are. The angle of the dance shows the direction."
    " | The patient, a man of 54, came with pain in the chest. He was given aspirin and felt better after an hour."
    " | The tenant shall pay the rent by the third day of each month. If he is late, the owner may add two percent."
    " | Vaccines train the immune system with a harmless part of a germ, so that it knows the germ when it comes."
    " | The murder of the duke led to a war among his sons, which the youngest won with the help of the merchants."
    " | A star of this size burns its fuel in a few million years and then explodes."
    " | The library is open from nine to six on weekdays, and until one on Saturdays."
)
_PROBLEMS = words(
    "Tom has 14 marbles and gives 5 to his sister. How many does he have left?"
    " | A baker sells 36 rolls in the morning and half as many in the afternoon. How many does he sell in all?"
    " | A train goes 80 km in an hour. How far does it go in two and a half hours?"
    " | Lena saves $6 a week for 15 weeks and then spends $40 on a game. How much money does she have?"
    " | There are 24 pupils in a class, and a third of them play football. How many do not?"
    " | A farmer has 12 cows, and each gives 18 litres of milk a day. He sells the milk for $0.5 a litre."
    " How much does he earn in a week?"
    " | A hunter walks 3 miles to his hut and 5 miles on to the lake, and then all the way back. How far is that?"
    " | Sam shoots 20 arrows and hits the target with 13 of them. What percentage does he miss?"
    " | A shirt costs $25 after a discount of 20%. What was the price before?"
    " | The prison kitchen needs 3 eggs for each of its 140 guests. Eggs come in boxes of 30. How many boxes is that?"
)
_CODE = words(
    "def total(items): return sum(item.price for item in items)"
    " | SELECT name, city FROM customers WHERE city = 'Oslo' ORDER BY name"
    " | for (int i = 0; i <= n; i++) { kill(children[i]); } | const doubled = numbers.map((n) => n * 2);"
    " | while True: data = read(); if not data: break"
)
_SENTENCES = words(
    "She go to the market every mornings. | He dont know where are the keys. | The meeting was moved to next Friday."
    " | It is raining cats and dogs. | The soldiers was tired after the long march."
    " | I would like a table for two by the window, please. | The old bridge was destroyed by the flood."
    " | My brother has been learning the piano since he was six. | Their is a stain on the carpet."
    " | The thief ran away before the police come."
)
_WORDS = words(
    "harbour | to borrow | stubborn | gravity | photosynthesis | inflation | to negotiate | weapon | fragile | election"
)
_REQUESTS = words(
    "Suggest five names for a shop that repairs bicycles."
    " | Write a product description for a waterproof backpack with three pockets."
    " | Write a polite email to a supplier whose delivery is late."
    " | List three advantages and three drawbacks of working at home."
    " | Give me a recipe for pancakes without milk, with amounts in grams."
    " | Write a tweet that announces our new opening hours. | Name the capital of each country in Scandinavia."
    " | What is the boiling point of water at 3,000 metres?"
    " | Write a regular expression that finds dates such as 2024-05-17."
    " | Explain the difference between a list and a tuple. | Who wrote The Count of Monte Cristo, and when?"
    " | Make a table of the planets with their distances from the sun."
    " | Write a dialogue between a doctor and a nervous patient."
    " | You are a pirate. Tell your crew that there is no more rum."
    " | Continue the story: The door was open, and the lights did not work."
    " | Plan a week of training for a first marathon. | How many bones has the human body?"
    " | What should a good cover letter for a nurse contain?"
    " | Put these in alphabetical order: pear, fig, apple, cherry, banana."
    " | Which of these does not belong: sword, spear, violin, bow?"
)

_KINDS = (
    (
        _REVIEWS,
        (
            "{text}",
            "Is this review positive or negative? {text}",
            "Review: {text}\nSentiment:",
            "Classify the sentiment of the text as positive or negative.\n\n{text}",
            "How many stars of five would the author of this give? {text}",
        ),
    ),
    (
        _NEWS,
        (
            "{text}",
            "What is the topic of this news: politics, sports, business or science?\n{text}",
            "Choose a category for the article.\n\nArticle: {text}\nCategory:",
            "Write a headline of at most eight words for this: {text}",
            "{text} Which place, persons and amounts are named? Answer as JSON.",
        ),
    ),
    (
        _MESSAGES,
        (
            "{text}",
            "Which department should answer? Choose billing, delivery, account or sales.\n\n{text}",
            "Is the following message spam? {text}",
            "Answer this customer in a friendly way: {text}",
        ),
    ),
    (
        _PASSAGES,
        (
            "Summarise in one sentence: {text}",
            "{text}\n\nQuestion: What happened first?\nAnswer:",
            "Write three questions that this text answers. {text}",
            "Rewrite the text so that a child understands it.\n{text}",
            "Translate into French: {text}",
            "Does the text say that it was in winter? Answer yes, no or not stated.\n\n{text}",
        ),
    ),
    (_PROBLEMS, ("{text}", "Solve step by step. {text}", "{text} Give the number alone.")),
    (_CODE, ("What does this code do?\n{text}", "Find the bug: {text}", "Write a comment for this line: {text}")),
    (
        _SENTENCES,
        (
            "Correct the grammar: {text}",
            "Translate to Spanish: {text}",
            "Say it in other words: {text}",
            "{text} Is this sentence formal or informal?",
        ),
    ),
    (_WORDS, ("What does '{text}' mean?", "Use the word '{text}' in a sentence.", "Give three synonyms of '{text}'.")),
    (_REQUESTS, ("{text}",)),
)


def task_prompts() -> list[str]:
    """Every text of every kind of task in each of its frames."""
    return [frame.format(text=text) for texts, frames in _KINDS for text, frame in product(texts, frames)]
