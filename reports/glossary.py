"""The words of the page, explained once, in alphabetical order."""

GLOSSARY = {
    "Bits per weight": (
        "Stored bits divided by the number of weights, scales and zero points included. "
        "A 4-bit format with one scale per 64 weights stores a little more than 4."
    ),
    "Budget": "The limit the plan had to respect, for instance a number of bytes in memory.",
    "Certificate": (
        "A proof, made by the solver, that no plan within the budget can have a predicted loss below a "
        "stated lower bound. It is about the predictions; how good these are is measured separately."
    ),
    "Confidence interval": (
        "The range in which the true value is expected to lie, given that only some text was measured."
    ),
    "Expert": "One of several parts of a mixture-of-experts layer, of which few are used for each token.",
    "Format": (
        "How the numbers of a unit are stored. int4_g64 means 4-bit integers with one scale for every 64; "
        "bf16 means 16 bits per number, not quantized."
    ),
    "Frontier": "For each size, the least predicted loss that any plan of that size was found to have.",
    "Gap": "Distance between the plan's predicted loss and the proven lower bound, as a share of the former.",
    "Held-out text": "Text that was used neither to measure the units nor to choose the plan.",
    "KL (Kullback-Leibler divergence)": (
        "How far the model's next-token probabilities moved from those of the reference, on average per "
        "token. 0 means that nothing changed. Measured in nats."
    ),
    "Loss": "Predicted increase of the KL if one unit is stored in one format and all else is left alone.",
    "MiB": "1,048,576 bytes.",
    "Nat": "Unit of information with the natural logarithm; 1 nat is 1.44 bits.",
    "Perplexity": (
        "How many tokens the model hesitates between, on average, when it predicts the held-out text. Lower is better."
    ),
    "Plan": "Which format each unit gets.",
    "Reference": "The same model before anything was quantized.",
    "Role": "What a unit does inside its layer, for instance q_proj (attention) or down_proj (feed-forward).",
    "Shadow price": "How much loss one more MiB of budget would save.",
    "Uniform baseline": "The simple alternative: the same format for every unit.",
    "Unit": "The smallest part of the model that gets one format: a weight matrix, an embedding, an expert.",
}
