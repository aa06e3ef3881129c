"""Prompts that drafts are trained and judged on: three tasks, and three others that they never see."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_TOPICS = """
rain, volcanoes, bread, bicycles, the moon, honey bees, chess, glass, rivers, the human heart, paper, trains, tea,
whales, electricity, deserts, soap, languages, magnets, mountains, music, coffee, clocks, forests, vaccines,
bridges, cheese, the internet, stars, football, salt, libraries, earthquakes, cotton, photography, owls, gravity,
chocolate, islands, robots, ice, money, gardens, lightning, spiders, maps, dreams, wheat, submarines, painting,
penguins, memory, wind, cities, plastic, horses, theatre, oil, snow, rice, radios, wolves, sleep, comets, leather,
dance, batteries, sharks, yoga, castles, weather, ants, satellites, poetry, gold, muscles, lakes, tomatoes, planes,
elephants, mathematics, steel, the sea, camels, television, sugar, lighthouses, fire, democracy, cats, telescopes,
wool, history
"""
TOPICS = [topic.strip() for topic in _TOPICS.replace("\n", " ").split(",")]

Task = Callable[[random.Random], str]

SAME: tuple[Task, ...] = (
    lambda draw: f"Explain in a few sentences what matters most about {draw.choice(TOPICS)} and {draw.choice(TOPICS)}.",
    lambda draw: f"List {draw.randint(4, 7)} facts about {draw.choice(TOPICS)}, for a class on {draw.choice(TOPICS)}.",
    lambda draw: f"Count from {(first := draw.randint(1, 60))} to {first + draw.randint(10, 30)}, separated by commas.",
)
OTHER: tuple[Task, ...] = (
    lambda draw: f"Write a short story in which {draw.choice(TOPICS)} and {draw.choice(TOPICS)} play a part.",
    lambda draw: (
        f"Write a Python function that adds {draw.randint(2, 99)} to a list of numbers about {draw.choice(TOPICS)}."
    ),
    lambda draw: f"What is {draw.randint(10, 999)} plus {draw.randint(10, 999)}? Show your steps.",
)


def prompts(tasks: str, size: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """`size` records of the tasks `same` or `other` in turn, with the column `prompt`."""
    kinds = {"same": SAME, "other": OTHER}[tasks]
    draw = random.Random(f"{tasks}/{seed}")
    for i in range(size):
        yield {"prompt": kinds[i % len(kinds)](draw)}
