"""`halfbyte serve`: many conversations on one model, spoken to in OpenAI's HTTP dialect.

engine     one thread that owns the model's steps; scheduler builds a step from many answers
answer     one answer in progress: sampler, stop strings, grammar, guesses
prefix     keys and values of prompts that were seen, shared with the next ones
memory     what keys and values may take
app        the routes; chat_api, completions_api, responses_api translate, guard keeps strangers out
"""
