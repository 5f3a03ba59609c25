"""The source of a `gcloud` whose TPUs are folders. It knows the flags that the vendor's reference lists, and no others.

A queued resource waits, is provisioned and active, one step at each listing. Orders: `refuse_create` (its line is the
error), `lose_create` (done, but told as an error), `fail` (its line is why), `stay` (in the queue), `suspend` (once it
trains), `ssh_down`, `start_down` (of ssh, what begins a pack), `list_down`, `lose_delete` (not done), `workers` (how
many a machine has), `port` (its line is where JAX's processes meet).
"""

SOURCE = """
FLAGS = {
    "create": "node-id zone project accelerator-type runtime-version spot service-account network subnetwork "
              "valid-until-duration async quiet labels",
    "list": "zone project filter format",
    "delete": "zone project force async quiet",
    "ssh": "zone project worker command quiet",
}

def write(name, **changes):
    path = queue / f"{name}.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, **changes}))

def read():
    return {path.stem: json.loads(path.read_text()) for path in sorted(queue.glob("*.json"))}

def begun(name):
    return any((machines / name).glob("*/slmjax/*/pid")) and (cloud / "trained").exists()

def advance():
    for name, item in read().items():
        state = item["state"]
        if state == "DELETING":
            (queue / f"{name}.json").unlink()
        elif state == "WAITING_FOR_RESOURCES" and not (orders / "stay").exists():
            why = ordered("fail")
            write(name, state="FAILED", error=why) if why else write(name, state="PROVISIONING")
        elif state == "PROVISIONING":
            write(name, state="ACTIVE")
        elif state == "ACTIVE" and begun(name) and ordered("suspend"):
            kill_machine(name)
            write(name, state="SUSPENDING")
        elif state == "SUSPENDING":
            write(name, state="SUSPENDED")

def create(name):
    if (why := ordered("refuse_create")):
        refuse(why)
    if name in read():
        refuse(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource {name!r} already exists")
    assert len(name) <= 63 and name == name.lower() and value("--node-id") == name, name
    others = [other for other in read() if other.rpartition("-")[0] == name.rpartition("-")[0]]
    if others:
        (cloud / "two").write_text(f"{name} beside {others}")
    write(name, state="WAITING_FOR_RESOURCES")
    with open(cloud / "created", "a") as file:
        file.write(name + "\\n")
    if ordered("lose_create"):
        refuse("ERROR: the connection was lost")

def show():
    advance()
    if ordered("list_down"):
        refuse("ERROR: gcloud crashed (ServerNotFoundError): unable to find the server")
    wanted, place = value("--filter").removeprefix("name~"), f"projects/p/locations/{value('--zone')}"
    print(json.dumps([
        {"name": f"{place}/queuedResources/{name}", "state": {"state": item["state"],
         **({"failedData": {"error": {"code": 8, "message": item["error"]}}} if item.get("error") else {})}}
        for name, item in read().items() if wanted in name
    ]))

def delete(name):
    if ordered("lose_delete"):
        refuse("ERROR: deadline exceeded")
    if name not in read():
        refuse("ERROR: NOT_FOUND")
    assert "--force" in args and "--async" in args, "without force an active one is not deleted"
    kill_machine(name)
    write(name, state="DELETING")

def ssh(login):
    user, _, name = login.partition("@")
    assert user == "slmjax", login
    if "run.part" in value("--command") and ordered("start_down"):
        sys.exit(1)
    if ordered("ssh_down") or read().get(name, {}).get("state") != "ACTIVE":
        print("ssh: connect to host port 22: Connection timed out", file=sys.stderr)
        sys.exit(255)
    fcntl.flock(lock, fcntl.LOCK_UN)
    workers = int((orders / "workers").read_text()) if (orders / "workers").exists() else 1
    for worker in range(workers) if value("--worker") == "all" else [int(value("--worker"))]:
        home = machines / name / str(worker)
        home.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "HOME": str(home), "WORKER": str(worker)}
        if (orders / "port").exists():  # what JAX learns on a TPU from its metadata
            env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{(orders / 'port').read_text()}"
            env |= {"JAX_NUM_PROCESSES": str(workers), "JAX_PROCESS_ID": str(worker), "JAX_NUM_CPU_DEVICES": "1"}
        done = subprocess.run(["bash", "-c", value("--command")], env=env, cwd=home)
        if done.returncode:
            sys.exit(done.returncode)

assert args[:2] == ["compute", "tpus"] and args[2] in ("queued-resources", "tpu-vm"), args
verb, words = args[3], [arg for arg in args[4:] if not arg.startswith("--")]
unknown = {arg[2:].split("=")[0] for arg in args[4:] if arg.startswith("--")} - set(FLAGS[verb].split())
assert not unknown, f"{verb} has no {unknown}"
{"create": create, "list": show, "delete": delete, "ssh": ssh}[verb](*words)
"""
