"""A model behind OpenAI's interface, for trying it.

requests.py   what clients may ask, and errors in OpenAI's form
worker.py     the one thread that runs the model: a bounded queue, rows that join and leave
answers.py    what the worker writes as OpenAI's objects, whole or in pieces
app.py        the routes        run.py   the process
"""
