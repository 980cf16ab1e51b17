import { useState } from "preact/hooks";
import { Field } from "../widgets/controls";
import { Dialog } from "../widgets/dialog";

interface KeyDialogProps {
  wrong: boolean;
  onKey: (key: string) => void;
}

/** Asks for the API key; it is kept for this tab alone. */
export function KeyDialog({ wrong, onKey }: KeyDialogProps) {
  const [key, setKey] = useState("");
  function submit(event: Event): void {
    event.preventDefault();
    if (key.trim() !== "") onKey(key.trim());
  }
  return (
    // Without a key there is nothing to go back to: closing asks again with what was typed, or the next request does.
    <Dialog title="This service asks for a key" onClose={() => onKey(key.trim())}>
      <form class="stack" onSubmit={submit}>
        {wrong && (
          <p class="warning" role="alert">
            The service did not accept that key.
          </p>
        )}
        <Field label="API key">
          <input
            type="password"
            autocomplete="off"
            required
            value={key}
            onInput={(event) => setKey(event.currentTarget.value)}
          />
        </Field>
        <p class="soft small">
          Kept until this tab is closed. Whoever runs the service makes keys with <code>bitplan keys add</code>.
        </p>
        <div>
          <button type="submit" class="primary">
            Use this key
          </button>
        </div>
      </form>
    </Dialog>
  );
}
