"""The service: models, a queue of jobs, plans by HTTP. Nothing here is imported before ``bitplan serve`` or ``worker``.

    page, Client ──HTTP──▶ app ──▶ records, queue (database) ◀── workers ──▶ the verbs of ``allocator``
                            └────▶ budgets, on profiles kept in memory

Queue libraries that were looked at and not taken: procrastinate and pgqueuer (PostgreSQL alone), huey, dramatiq, rq and
celery (a broker beside the database, or tasks that a killed worker loses), APScheduler 4 (unreleased).
"""
