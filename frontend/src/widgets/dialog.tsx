import type { ComponentChildren } from "preact";
import { useEffect, useId, useRef } from "preact/hooks";

interface DialogProps {
  title: ComponentChildren;
  onClose: () => void;
  children: ComponentChildren;
}

/** A modal dialog: the browser keeps the focus inside, closes it on Escape and gives the focus back. */
export function Dialog({ title, onClose, children }: DialogProps) {
  const dialog = useRef<HTMLDialogElement>(null);
  const heading = useId();
  const close = useRef(onClose);
  close.current = onClose;
  useEffect(() => {
    const element = dialog.current;
    if (element === null) return;
    const closed = () => close.current();
    element.showModal();
    element.addEventListener("close", closed);
    return () => {
      // Closed by the page itself, which knows: nobody has to be told, but the focus goes back.
      element.removeEventListener("close", closed);
      element.close();
    };
  }, []);
  return (
    <dialog ref={dialog} aria-labelledby={heading}>
      <div class="dialog-body">
        <div class="dialog-heading">
          <h2 id={heading}>{title}</h2>
          <button type="button" class="plain" aria-label="Close" onClick={onClose}>
            ✕
          </button>
        </div>
        {children}
      </div>
    </dialog>
  );
}
