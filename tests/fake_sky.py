"""The source of a `sky` whose managed jobs are processes here. It knows the flags of SkyPilot 0.14, and no others.

A job waits at one listing, then runs its task's `run` lines in bash. Orders: `refuse` (its line is the error), `lose`
(taken, but told as an error), `preempt` (once it runs: killed and begun again), `fail` (its status), `asleep` (the
controller: there are no jobs, it says), `down` (it cannot be asked), `hide` (a job that was taken is not listed yet).
"""

SOURCE = """
FLAGS = {
    "launch": {"--name": 1, "--env": 1, "--detach-run": 0, "--yes": 0, "--gpus": 1},
    "queue": {"--all": 0, "--verbose": 0, "--output": 1},
    "cancel": {"--name": 1, "--yes": 0},
}

def write(job, **changes):
    path = queue / f"{job}.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, **changes}))

def begin(job, item):
    home = machines / job
    home.mkdir(exist_ok=True)
    wrapped = f"{item['run']}\\necho $? > {home}/code.part; mv {home}/code.part {home}/code"
    env = {**os.environ, **item["env"]}
    with open(home / "log", "a") as log:
        process = subprocess.Popen(["bash", "-c", wrapped], env=env, cwd=cloud, stdin=subprocess.DEVNULL,
                                   stdout=log, stderr=log, start_new_session=True)
    (home / "pid").write_text(str(process.pid))

def advance():
    for path in sorted(queue.glob("*.json")):
        job, item = path.stem, json.loads(path.read_text())
        code = machines / job / "code"
        if item["status"] == "PENDING":
            why = ordered("fail")
            if why:
                write(job, status=why, failure_reason="no machine")
                continue
            write(job, status="STARTING")
        elif item["status"] in ("STARTING", "RECOVERING"):
            begin(job, item)
            write(job, status="RUNNING")
        elif item["status"] == "RUNNING" and code.exists():
            status = {0: "SUCCEEDED"}.get(int(code.read_text()), "FAILED")
            write(job, status=status)
        elif item["status"] == "RUNNING" and (cloud / "trained").exists() and ordered("preempt"):
            kill_machine(job)
            write(job, status="RECOVERING", recovery_count=item["recovery_count"] + 1)

def parse(verb):
    positional, named, rest = [], {}, args[2:]
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        assert word in FLAGS[verb], f"sky jobs {verb} has no {word}"
        named.setdefault(word, []).append(rest.pop(0) if FLAGS[verb][word] else True)
    return positional, named

def launch():
    (task,), named = parse("launch")
    assert "--yes" in named and "--detach-run" in named, "it would wait"
    if (why := ordered("refuse")):
        refuse(why)
    (name,) = named["--name"]
    number = len(list(queue.glob("*.json"))) + 1
    text = pathlib.Path(task).read_text()
    run = text.split("run: |", 1)[1]
    write(f"{number:04d}", job_id=number, job_name=name, status="PENDING", run=run, recovery_count=0,
          hidden=bool(ordered("hide")), env=dict(pair.split("=", 1) for pair in named["--env"]))
    if (how := ordered("lose")):
        if how == "hang":
            fcntl.flock(lock, fcntl.LOCK_UN)
            time.sleep(60)
        refuse("sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server")

def show():
    parse("queue")
    if ordered("down"):
        refuse("sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server")
    if ordered("asleep"):
        refuse("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.")
    advance()
    print("A newer version of SkyPilot is out [0.15.0].")  # such lines come before the answer
    jobs = []
    for path in sorted(queue.glob("*.json"), reverse=True):
        item = json.loads(path.read_text())
        if item["hidden"]:
            write(path.stem, hidden=False)
        else:
            jobs.append({key: item.get(key) for key in ("job_id", "job_name", "status", "recovery_count", "infra")})
    print(json.dumps(jobs, indent=2))

def cancel():
    _, named = parse("cancel")
    for path in queue.glob("*.json"):
        if json.loads(path.read_text())["job_name"] == named["--name"][0]:
            kill_machine(path.stem)
            write(path.stem, status="CANCELLED")

assert args[0] == "jobs", args
{"launch": launch, "queue": show, "cancel": cancel}[args[1]]()
"""
